"""Two ranks record what one records, and fail together."""

from pathlib import Path

from tests.callbacks import two_process_script
from tests.processes import run_apart


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    assert "all equal" in run_apart(tmp_path, two_process_script.main)

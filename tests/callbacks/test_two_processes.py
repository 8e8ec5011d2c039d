"""Two ranks record what one records, and fail together."""

from pathlib import Path

from tests.metrics.toys import run_two_processes


def test_two_ranks_equal_one() -> None:
    assert "all equal" in run_two_processes(Path(__file__).with_name("two_process_script.py"))

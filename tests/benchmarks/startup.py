"""CPU seconds until a command answers: help, and the first iteration of the quickstart.

python -m tests.benchmarks startup [--out FILE]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.measuring import keep

ROOT = Path(__file__).resolve().parents[2]
FIRST = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.max_steps", "1", "--summary", "false",
         "--trainer.limit_val_batches", "0"]  # fmt: skip
COMMANDS = {"help": ["--help"], "sample --help": ["sample", "--help"], "fit --help": ["fit", "--help"],
            "first iteration": FIRST}  # fmt: skip


def seconds(words: list[str]) -> float:
    """CPU seconds of ``unidad WORDS`` in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "unidad_pl.cli", *words], cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out")
    given = parser.parse_args()
    keep({name: min(seconds(words) for _ in range(2)) for name, words in COMMANDS.items()}, given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

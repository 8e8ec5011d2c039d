"""Benchmarks, each a command: ``python -m tests.benchmarks NAME [options]``."""

from __future__ import annotations

import importlib
import sys

NAMES = ("step", "evaluation", "sampling", "startup", "scaling", "gpu", "soak", "page")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"{__doc__}\nchoose one of {', '.join(NAMES)}")
    sys.exit(importlib.import_module(f"tests.benchmarks.{sys.argv.pop(1)}").main())

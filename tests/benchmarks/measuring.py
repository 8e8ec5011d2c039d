"""What benchmarks have in common: things that take turns, because a shared machine is fast and slow by turns."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unidad_pl.callbacks.environment import processor
from unidad_pl.denoiser import Denoiser, DenoiserSource


class RandomWeights(DenoiserSource):
    """The architecture of a source, its weights drawn."""

    def __init__(self, of: DenoiserSource) -> None:
        self.of = of

    def build(self) -> Denoiser:
        return self.of.architecture()


def interleaved(repetitions: int, **things: Callable[[], object]) -> dict[str, float]:
    """Median CPU seconds of each thing; they take turns, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for number in range(repetitions + 1):
        for name, thing in things.items():
            began = time.process_time()
            thing()
            if number:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(own) for name, own in seconds.items()}


def machine() -> dict[str, Any]:
    """Where this was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit.stdout.strip(), "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "processor": processor(), "gpu": gpu,
    }  # fmt: skip


def keep(results: dict[str, Any], path: str | None) -> None:
    """Print the results as JSON, and write them to ``path``."""
    text = json.dumps(results | {"machine": machine()}, indent=1)
    print(text)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n")

"""What a run was made with besides its config: versions, commit, machine, command."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import SaveConfigCallback

from unidad_pl.callbacks.records import append_record, on_rank_zero, run_folder

FILE = "environment.jsonl"
PACKAGES = ("unidad_pl", "torch", "lightning", "torchmetrics", "diffusers", "transformers", "safetensors", "numpy")


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml``, and at every start of the run a line of :func:`environment` to ``environment.jsonl``."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        first = not self.already_saved
        super().setup(trainer, pl_module, stage)
        if first:
            path = run_folder(trainer) / FILE
            record = environment(trainer) | {"stage": stage, "seed": self.config.get("seed_everything")}
            on_rank_zero(trainer, path, lambda: append_record(path, record))


def environment(trainer: pl.Trainer) -> dict[str, Any]:
    """Plain data about this process and the trainer's machine."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "host": platform.node(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "cuda": torch.version.cuda,
        "gpus": devices,
        "git": git_commit(Path(__file__).parent),
        "processes": trainer.world_size,
        "precision": trainer.precision,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_commit(folder: Path) -> str | None:
    """The commit that ``folder`` is at, with ``+changes`` if files differ from it; None outside a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    if shutil.which("git") is None or not (commit := git("rev-parse", "--verify", "HEAD")):
        return None
    return commit + ("+changes" if git("status", "--porcelain") else "")

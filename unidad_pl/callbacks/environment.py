"""What a run was made with besides its config: versions, commit, machine, command."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from unidad_pl.callbacks.records import append_record, on_rank_zero, run_folder
from unidad_pl.files import replacing

FILE = "environment.jsonl"
STARTED = "run_started"
"""Entry of a checkpoint: when the run that wrote it began, ISO 8601 in UTC."""
PACKAGES = ("unidad_pl", "torch", "lightning", "torchmetrics", "diffusers", "transformers", "safetensors", "numpy")


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml``, and at every start of the run a line of :func:`environment` to ``environment.jsonl``.

        >>> from unidad_pl.cli.lightning import run
        >>> run(["fit", "--config", "configs/quickstart.yaml"])  # doctest: +SKIP

    A fit is recorded when it begins to train: one that was to go on from a checkpoint and is refused leaves the config
    as it was. Checkpoints get the time of that start, by which ``--ckpt_path last`` tells runs apart. Where the run's
    folder is deleted while it trains, both files are written anew, with a warning; ``deleted_at`` is the iteration
    then.

    Args:
        text: of ``config.yaml``.
        lightning: the arguments of Lightning's callback.
    """

    deleted_at: int | None = None
    _started = ""

    def __init__(self, *lightning: Any, text: str, **named: Any) -> None:
        super().__init__(*lightning, **named)
        self.text = text

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.already_saved:
            return
        self._folder = run_folder(trainer)
        self._record = environment(trainer) | {"stage": stage, "seed": self.config.get("seed_everything")}
        self._started = datetime.now(timezone.utc).isoformat()
        if stage != "fit":
            self._save(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if not self.already_saved:
            on_rank_zero(trainer, self._folder, self._write)
            self.already_saved = True

    def _write(self) -> None:
        with replacing(self._folder / self.config_filename) as part:
            part.write_text(self.text, encoding="utf-8")
        append_record(self._folder / FILE, self._record)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.is_global_zero and not (self._folder / self.config_filename).is_file():
            self.deleted_at = trainer.global_step
            self._write()
            rank_zero_warn(
                f"{str(self._folder)!r} was deleted or moved while the run was writing there: config.yaml is written "
                f"anew and training goes on, but checkpoints and numbers from before iteration {self.deleted_at} are "
                f"gone, and TensorBoard's may stay away"
            )

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        checkpoint[STARTED] = self._started


def unidad_command() -> str:
    """``unidad`` as the user's shell finds it: with its path if it lies in an environment that is not activated."""
    beside = Path(sys.executable).with_name("unidad")
    return "unidad" if shutil.which("unidad") or not beside.exists() else shlex.quote(str(beside))


def environment(trainer: pl.Trainer) -> dict[str, Any]:
    """Plain data about this process and the trainer's machine."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "host": platform.node(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "cuda": torch.version.cuda,
        "gpus": devices,
        "processor": processor(),
        "cores": os.cpu_count(),
        "git": git_commit(Path(__file__).parent),
        "processes": trainer.world_size,
        "precision": trainer.precision,
    }


def processor() -> str | None:
    """The processor's name as the system calls it; None where it does not tell."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # Linux, where platform tells little
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or None


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

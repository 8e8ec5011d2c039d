"""``metrics.jsonl``: one line per evaluation, so that every number keeps what it was measured with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn

FILE = "metrics.jsonl"


def run_folder(trainer: pl.Trainer) -> Path:
    """Where this run writes, the same on every rank: ``save_dir/name/version`` of the first logger, as its checkpoints
    do; without a logger ``default_root_dir``.

    All ranks must call it together: the folder of rank 0 is broadcast.
    """
    first = trainer.loggers[0] if trainer.loggers else None
    if first is None or isinstance(first, (TensorBoardLogger, CSVLogger, DummyLogger)):
        return Path(trainer.log_dir or trainer.default_root_dir)
    # Lightning's trainer.log_dir is save_dir alone here, which all runs of a W&B or MLflow project share.
    version = first.version if isinstance(first.version, str) else f"version_{first.version}"
    folder = os.path.join(first.save_dir or trainer.default_root_dir, str(first.name), version)
    return Path(trainer.strategy.broadcast(folder))


def trained_iterations(trainer: pl.Trainer) -> int:
    """For how many iterations the weights at hand were trained.

    Outside of ``fit`` Lightning leaves ``trainer.global_step`` as it is whatever checkpoint it loads. A module that
    keeps its own count as ``iteration``, as ours do, knows better; else the checkpoint says it.
    """
    own = getattr(trainer.lightning_module, "iteration", None)
    if trainer.state.fn == TrainerFn.FITTING or isinstance(own, bool) or not isinstance(own, (int, torch.Tensor)):
        own = None
    if own is None and trainer.state.fn != TrainerFn.FITTING and trainer.ckpt_path:
        own = _step_in(Path(trainer.ckpt_path))
    return trainer.global_step if own is None else int(own)


def _step_in(checkpoint: Path) -> int | None:
    """``global_step`` of a Lightning checkpoint, a file or a sharded folder, or None if it is no plain data."""
    path = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return int(content["global_step"])
    except Exception:  # noqa: BLE001 (others' files: whatever is wrong with them, the evaluation is worth keeping)
        return None


def _plain(value: Any) -> Any:
    """``value`` with null for the numbers that JSON cannot write: NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a JSON-lines file. A line that a killed run left unfinished stays a line of its own.

    Raises:
        OSError: the folder cannot be made, or the file not written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_plain(record), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON-lines file, in order; unfinished ones, and what is no mapping, are left out.

    Raises:
        FileNotFoundError: no such file.
    """
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def on_rank_zero(trainer: pl.Trainer, path: Path, write: Callable[[], None]) -> None:
    """Call ``write`` on rank 0; if it fails to write ``path``, every rank raises, so that none is left waiting.

    Nothing is written in a ``fast_dev_run``.

    Raises:
        RuntimeError: says what could not be written, and why.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    failure = None
    if trainer.is_global_zero:
        try:
            write()
        except OSError as error:
            failure = f"{type(error).__name__}: {error}"
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        raise RuntimeError(
            f"cannot write {path} ({failure}). Free disk space, restore the folder or its permissions, then resume "
            f"from the last checkpoint; or remove the callback."
        )

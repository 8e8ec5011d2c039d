"""``--ckpt_path last``: the newest intact checkpoint of a config's runs, and the log folder it belongs to."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from unidad_pl.runs.checkpoints import is_remote, newest_intact
from unidad_pl.runs.config import CONFIG_FILE

if TYPE_CHECKING:
    import lightning.pytorch as pl

WORDS = ("last", "auto")
"""``last``: the newest intact checkpoint, an error if there is none. ``auto``: the same, but begin where there is none,
for jobs that are queued again."""


def run_tree(trainer: pl.Trainer) -> list[Path]:
    """The folders in which all runs of this config write checkpoints."""
    if trainer.loggers:
        first = trainer.loggers[0]
        folders = [Path(first.save_dir or trainer.default_root_dir) / str(first.name or "")]
    else:
        folders = [Path(trainer.default_root_dir) / "checkpoints"]
    given = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return folders + [Path(folder) for folder in given if folder is not None]


def find_checkpoint(trainer: pl.Trainer, wanted: str | Path | None) -> str | None:
    """The file that ``--ckpt_path`` means: a path, one of :data:`WORDS`, or nothing.

    Raises:
        FileNotFoundError: no such file; or ``last`` where there is no intact checkpoint.
    """
    if wanted is None or is_remote(wanted):
        return None if wanted is None else str(wanted)
    if wanted not in WORDS:
        if not Path(wanted).expanduser().is_file():
            raise FileNotFoundError(
                f"--ckpt_path {str(wanted)!r} is no file: give the checkpoint's path, e.g. "
                f"RUN/checkpoints/last.ckpt, or last for the newest of this config's runs"
            )
        return str(Path(wanted).expanduser())
    folders = run_tree(trainer)
    path, passed_over = newest_intact(*folders)
    for reason in passed_over.values():
        rank_zero_warn(f"--ckpt_path {wanted} passes over a checkpoint: {reason}")
    where = " or ".join(repr(str(folder)) for folder in folders)
    if path is None and wanted == "last":
        damaged = f" ({len(passed_over)} damaged ones are there)" if passed_over else ""
        raise FileNotFoundError(
            f"--ckpt_path last: there is no intact checkpoint in {where}{damaged}. Leave it out to begin a new run"
        )
    rank_zero_info(f"--ckpt_path {wanted}: {path or f'nothing in {where}, a new run begins'}")
    return None if path is None else str(path)


def choose_folder(trainer: pl.Trainer, checkpoint: str | None) -> None:
    """One folder for all loggers whose config names no version: that of the run which wrote ``checkpoint``, or the
    first logger's. Lightning would give each the next number that is free when it starts."""
    undecided = [logger for logger in trainer.loggers if getattr(logger, "_version", "given") is None]
    if not undecided:
        return
    version = _version_of(run_tree(trainer)[0], checkpoint) if checkpoint else None
    for logger in undecided:
        logger._version = trainer.loggers[0].version if version is None else version  # type: ignore[attr-defined]
        if version is not None and isinstance(logger, CSVLogger):
            _keep_rows(logger)


def _version_of(root: Path, checkpoint: str) -> str | None:
    """The folder below ``root`` whose run wrote ``checkpoint``, if it is one of a run."""
    file = Path(checkpoint).resolve()
    if root.resolve() not in file.parents:
        return None
    version = file.relative_to(root.resolve()).parts[0]
    return version if (root / version / CONFIG_FILE).is_file() else None


@rank_zero_only
def _keep_rows(logger: CSVLogger) -> None:
    """Lightning's CSV logger deletes the file it finds in its folder: put the rows back."""
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return
    kept = path.with_suffix(".csv.kept")
    path.replace(kept)
    experiment = logger.experiment
    kept.replace(path)
    with path.open(newline="") as file:
        experiment.metrics_keys = list(csv.DictReader(file).fieldnames or [])

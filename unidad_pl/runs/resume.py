"""``--ckpt_path last``: the newest intact checkpoint of a config's runs, and the log folder it belongs to."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from unidad_pl.callbacks.environment import FILE as RECORD
from unidad_pl.files import expanded
from unidad_pl.runs.checkpoints import is_remote, newest_intact
from unidad_pl.runs.config import CONFIG_FILE, EVENTS

if TYPE_CHECKING:
    import lightning.pytorch as pl

WORDS = ("last", "auto")
"""``last``: the newest intact checkpoint, an error if there is none. ``auto``: the same, but begin where there is none,
for jobs that are queued again."""


def run_tree(trainer: pl.Trainer) -> list[Path]:
    """The folders in which all runs of this config write checkpoints."""
    if trainer.loggers:
        first = trainer.loggers[0]
        own = isinstance(first, (TensorBoardLogger, CSVLogger))
        name = str(first.name or "") if own else str(first.name)  # as the checkpoint callback names its folder
        folders = [Path(first.save_dir or trainer.default_root_dir) / name]
    else:
        folders = [Path(trainer.default_root_dir) / "checkpoints"]
    given = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return folders + [Path(folder) for folder in given if folder is not None]


def own_run(configs: Sequence[str | Path]) -> Path | None:
    """The run folder whose ``config.yaml`` is among ``configs``, the first of them; None if none is a run's own."""
    folders = (expanded(config).parent for config in configs if Path(config).name == CONFIG_FILE)
    return next((folder for folder in folders if (folder / RECORD).is_file()), None)


def find_checkpoint(trainer: pl.Trainer, wanted: str | Path | None, configs: Sequence[str | Path] = ()) -> str | None:
    """The file that ``--ckpt_path`` means: a path, one of :data:`WORDS`, or nothing.

    Args:
        trainer: writes to the folders that are searched.
        wanted: the value of the option.
        configs: the files that were given; where one is ``config.yaml`` of a run, its own checkpoints are meant, not
            those of a later run of that name.

    Raises:
        FileNotFoundError: no such file; or ``last`` where there is no intact checkpoint.
    """
    if wanted is None or is_remote(wanted):
        return None if wanted is None else str(wanted)
    if wanted not in WORDS:
        if not expanded(wanted).is_file():
            raise FileNotFoundError(
                f"--ckpt_path {str(wanted)!r} is no file: give the checkpoint's path, e.g. "
                f"RUN/checkpoints/last.ckpt, or last for the newest of this config's runs"
            )
        return str(expanded(wanted))
    folders = run_tree(trainer)
    if (own := own_run(configs)) is not None:
        folders[0] = own
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


def choose_folder(trainer: pl.Trainer, checkpoint: str | None) -> list[Path]:
    """One folder for all loggers whose config names no version: that of the run which wrote ``checkpoint``, or one that
    no other run has. Lightning would give each the next number that is free when it starts, and two that start in the
    same second the same. Other ranks follow rank 0, whose folder Lightning broadcasts.

    Returns:
        The folders that were made.

    Raises:
        OSError: the folder cannot be made.
    """
    undecided = [logger for logger in trainer.loggers if getattr(logger, "_version", "given") is None]
    if not trainer.loggers:
        rank_zero_info(f"no logger: this run writes to {trainer.default_root_dir!r} (--trainer.default_root_dir)")
    if not undecided or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []
    version: Any = _version_of(run_tree(trainer)[0], checkpoint) if checkpoint else None
    resumed = version is not None
    made: list[Path] = []
    if not resumed:
        version, made = _claim(undecided)
    for logger in undecided:
        logger._version = version  # type: ignore[attr-defined]
        if resumed and isinstance(logger, CSVLogger):
            _keep_rows(logger)
    return made


def event_files(trainer: pl.Trainer) -> set[Path]:
    """TensorBoard's files in the folders of the loggers, on rank 0."""
    folders = {logger.log_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)}
    return {path for folder in folders if not is_remote(folder) for path in Path(folder).glob(f"{EVENTS}*")}


def remove_unused(made: Iterable[Path]) -> None:
    """Remove what a fit made that was refused before its first iteration: folders, unless it has written more than its
    start, and files."""
    for path in made:
        with suppress(OSError):  # the refusal is what matters
            if path.is_file():
                path.unlink()
                continue
            left = {entry.name for entry in path.iterdir()} - {CONFIG_FILE, RECORD, "hparams.yaml"}
            if all(name.startswith(EVENTS) for name in left):
                shutil.rmtree(path)


def _claim(loggers: list[Any]) -> tuple[int, list[Path]]:
    """Make a new folder ``version_N`` in the root of each logger, with the same N: no other run can have made it."""
    version = max(logger._get_next_version() for logger in loggers)
    local = [expanded(logger.root_dir).resolve() for logger in loggers if not is_remote(logger.root_dir)]
    roots = list(dict.fromkeys(local))  # two names of one folder would be in each other's way for ever
    while True:
        made: list[Path] = []
        try:
            for root in roots:
                folder = root / f"version_{version}"
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir()
                made.append(folder)
        except FileExistsError:
            for folder in made:
                folder.rmdir()
            version += 1
        else:
            return version, made


def _version_of(root: Path, checkpoint: str) -> str | None:
    """The folder below ``root`` whose run wrote ``checkpoint``, if it is one of a run."""
    file = Path(checkpoint).resolve()
    if root.resolve() not in file.parents:
        return None
    version = file.relative_to(root.resolve()).parts[0]
    return version if (root / version / CONFIG_FILE).is_file() else None


def _keep_rows(logger: CSVLogger) -> None:
    """Lightning's CSV logger deletes the file it finds in its folder: put the rows back."""
    path = Path(logger.log_dir) / "metrics.csv"
    kept = path.with_suffix(".csv.kept")
    if not kept.is_file():  # else a start was killed below, and what it kept is the whole
        if not path.is_file():
            return
        path.replace(kept)
    experiment = logger.experiment
    kept.replace(path)
    with path.open(newline="") as file:
        experiment.metrics_keys = list(csv.DictReader(file).fieldnames or [])

"""``metrics.jsonl``: one line per evaluation, so that every number keeps what it was measured with."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn

from unidad_pl.files import BrokenFile, whole_number

FILE = "metrics.jsonl"
MOST_SAID = 5  # lines of one file that are named one by one
log = logging.getLogger(__name__)


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

    Outside of ``fit`` Lightning leaves ``trainer.global_step`` as it is whatever checkpoint it loads. Our modules keep
    their own count, ``iteration``; of others the checkpoint says it.
    """
    module = trainer.lightning_module
    ours = trainer.state.fn != TrainerFn.FITTING and callable(getattr(module, "iteration_kind", None))
    own: int | None = getattr(module, "iteration", None) if ours else None
    if own is None and trainer.state.fn != TrainerFn.FITTING and trainer.ckpt_path:
        own = _step_in(Path(trainer.ckpt_path))
    return trainer.global_step if own is None else own


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
    """Add one line to a JSON-lines file. A last line that a killed run left unfinished is taken out, with a warning.

    Raises:
        OSError: the folder cannot be made, or the file not written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_plain(record), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        file.seek(0)
        before, _, last = file.read().rpartition(b"\n")
        if is_unfinished(last):  # further up it would be damage, and no longer what a killed run leaves
            log.warning("the last line of %r was cut short when a run was killed: it is taken out", str(path))
            file.truncate(len(before) + 1 if before else 0)
        elif last:
            line = "\n" + line
        file.write(line.encode())


def is_unfinished(line: bytes) -> bool:
    """Whether a line that has no end is the beginning of a record.

    >>> is_unfinished(b'{"step": 3, "val'), is_unfinished(b'{"step": 3}')
    (True, False)
    """
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith(b"{")
    return False


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(type(one) in (int, float, NoneType) for one in value.values())


ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (lambda value: type(value) is int and value >= 0, "a whole number of at least 0"),
    "stage": (lambda value: isinstance(value, str), "a word"),
    "values": (_are_numbers, "names, each with a number or null"),
    "metric": (lambda value: isinstance(value, str), "a word"),
    "time": (lambda value: isinstance(value, str), "a word"),
    "subject": (lambda value: isinstance(value, (str, NoneType)), "a word or null"),
    "tflops": (lambda value: type(value) in (int, float, NoneType), "a number or null"),
    "floor": (_are_numbers, "names, each with a number or null"),
}
"""What readers count on in a line of ``metrics.jsonl``: entry -> whether a value will do, and what it must be."""
NEEDED = ("step", "stage", "values")
"""Entries that every line has."""


def check_record(record: dict[str, Any]) -> None:
    """Refuse what no evaluation writes.

        >>> check_record({"step": 3, "stage": "val", "values": {"fid": "low"}})
        Traceback (most recent call last):
        ...
        ValueError: its entry 'values' is {'fid': 'low'}, and must be names, each with a number or null

    Raises:
        ValueError: names the entry, its value and what it must be.
    """
    for name, (fits, what) in ENTRIES.items():
        if name in record and not fits(record[name]):
            raise ValueError(f"its entry {name!r} is {record[name]!r:.60}, and must be {what}")
        if name in NEEDED and name not in record:
            raise ValueError(f"it has no entry {name!r}, which must be {what}")


def read_records(path: str | Path, left_out: list[str] | None = None) -> list[dict[str, Any]]:
    """The evaluations in a ``metrics.jsonl``, in order; with null for numbers that are not finite.

    Args:
        path: the file.
        left_out: gets a sentence for each line that cannot be used, and the others are returned. None: such a line is
            an error, only a last one that a killed run left unfinished is a warning.

    Raises:
        FileNotFoundError: no such file.
        BrokenFile: names file and line, and what is wrong there.
    """
    return read_lines(path, check_record, left_out)


def read_lines(
    path: str | Path, check: Callable[[dict[str, Any]], None], left_out: list[str] | None = None
) -> list[dict[str, Any]]:
    """The objects in any JSON-lines file, as :func:`read_records`; ``check`` raises a ValueError of a wrong one."""
    records: list[dict[str, Any]] = []
    damaged: list[str] = []
    unfinished: list[str] = []
    lines = Path(path).read_bytes().split(b"\n")  # the last one is empty where the last line is whole
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = _plain(json.loads(line.decode(), parse_int=whole_number))
            if not isinstance(record, dict):
                raise ValueError(f"it is no JSON object but a {type(record).__name__}")
            check(record)
            records.append(record)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and is_unfinished(line):
                unfinished.append(f"line {number} was cut short when the run was killed, and is left out")
                continue
            known = f"no JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
            damaged.append(f"line {number} cannot be used ({known}): correct that line, or delete it")
    if left_out is not None:
        more = [f"{len(damaged) - MOST_SAID} more lines cannot be used"] if len(damaged) > MOST_SAID else []
        left_out += [f"{Path(path).name}: {one}" for one in (*damaged[:MOST_SAID], *more, *unfinished)]
    elif damaged:
        raise BrokenFile(f"{str(path)!r}: {damaged[0]}")
    else:
        for one in unfinished:
            log.warning("%r: %s", str(path), one)
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

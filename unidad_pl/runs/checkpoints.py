"""Checkpoints that survive: written beside the old file and moved over it, with a checksum that every load verifies.

A checkpoint is the zip that ``torch.save`` writes, with ``sha256:<digest>`` as its zip comment: plain ``torch.load``
and ``unzip`` read it, and a file that is cut short or has a flipped bit is noticed. Code in a checkpoint never runs.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from unidad_pl.backbones.weights import read_plain
from unidad_pl.callbacks.environment import STARTED
from unidad_pl.files import BrokenFile, reading, replacing

MARK = b"sha256:"
COMMENT = len(MARK) + hashlib.sha256().digest_size * 2
END, END_SIZE = b"PK\x05\x06", 22  # a zip's last record; its last two bytes are the length of the comment after it
CHUNK = 1 << 22
ABANDONED = 3600.0  # seconds after which a temporary file belongs to a run that was killed while it wrote


ENTRIES = {
    "state_dict": dict, "global_step": int, "epoch": int, "pytorch-lightning_version": str, "loops": dict,
    "callbacks": dict, "optimizer_states": list, "lr_schedulers": list,
}  # fmt: skip
"""What Lightning reads when it resumes; only the first must be there."""


class DamagedCheckpoint(BrokenFile):
    """A checkpoint file that is not what was written; the message says which, and what to resume from.

    >>> raise DamagedCheckpoint("'last.ckpt' is damaged: it is cut short")
    Traceback (most recent call last):
    ...
    unidad_pl.runs.checkpoints.DamagedCheckpoint: 'last.ckpt' is damaged: it is cut short
    """


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's file IO made safe: ``pl.Trainer(plugins=[DurableCheckpointIO()])``; the ``unidad`` command has it.

    * A file appears whole or not at all, and replaces an older one only once it is on the disk: temporary file in the
      same folder, fsync, rename, fsync of the folder. Lightning's own temporary file lies in ``$TMPDIR``; where that is
      another filesystem, a kill at the wrong moment leaves half a checkpoint in the place of a good one.
    * It is streamed: no second copy of the state in memory.
    * Every load verifies the checksum, and reads with ``weights_only=True``.

    Remote paths (``s3://...``) are written as Lightning does, and not verified.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``.

        Raises:
            OSError: it cannot be written (disk full, read-only); the file that was there before is untouched.
        """
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verify and read a checkpoint.

        Raises:
            FileNotFoundError: there is none.
            DamagedCheckpoint: it was cut short or changed; names the newest intact one of its folder.
            BrokenFile: it carries code, or is no checkpoint of Lightning.
            ValueError: ``weights_only=False`` asks to run code.
        """
        if weights_only is False:
            raise ValueError(
                "weights_only=False would run code that a checkpoint carries: leave it out, or take this plugin "
                "(DurableCheckpointIO) away for a file you trust"
            )
        content = read_checkpoint(path, map_location)
        check_entries(content, path)
        return content


def is_remote(path: str | Path) -> bool:
    """Whether ``path`` is an address such as ``s3://...`` and no local file."""
    return "://" in str(path)


class _Sink:
    """What ``torch.save`` writes to: hashes what passes, and keeps the error that torch would hide."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write ``checkpoint`` to ``path``, which holds the old file or the new one at any moment.

    Raises:
        OSError: names the file, the reason and the way out; nothing is left behind.
    """
    sink = None
    try:
        with replacing(path) as part:
            _remove_abandoned(path.parent)
            with part.open("xb") as file:
                sink = _Sink(file)
                torch.save(checkpoint, cast(BinaryIO, sink))  # torch only writes and flushes
                file.seek(-2, os.SEEK_END)
                file.write(COMMENT.to_bytes(2, "little") + MARK + sink.digest.hexdigest().encode())
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch turns an OSError of its file into a RuntimeError of its own
        reason = (sink.failure if sink is not None else None) or error
        if not isinstance(reason, OSError):
            raise
        message = (
            f"cannot write the checkpoint ({reason.strerror}){_room(path)}; earlier ones are untouched. Make room or "
            f"name another folder, then resume with --ckpt_path last"
        )
        raise OSError(reason.errno, message, str(path)) from error


def _room(path: Path) -> str:
    for folder in path.parents:
        if folder.is_dir():
            return f", {shutil.disk_usage(folder).free / 2**20:.0f} MiB are free in {str(folder)!r}"
    return ""


def _remove_abandoned(folder: Path) -> None:
    """Delete temporary files of runs that were killed while they wrote."""
    for leftover in folder.glob(".*.ckpt.*.part"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > ABANDONED:
                leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure, where the filesystem can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def verify_checkpoint(path: str | Path) -> None:
    """Check a file against its checksum; one that others wrote, without a checksum, against the CRCs of its zip.

    Raises:
        FileNotFoundError: there is none.
        DamagedCheckpoint: says what is wrong with it.
    """
    if not (path := Path(path)).is_file():
        folder = ", which is a folder: give a file in it, such as RUN/checkpoints/last.ckpt" if path.is_dir() else ""
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}{folder}")
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - END_SIZE - COMMENT))
        tail = file.read()
        if tail[-END_SIZE:].startswith(END) and tail.endswith(b"\0\0"):
            return _check_zip(path)
        record, comment = tail[:END_SIZE], tail[END_SIZE:]
        length = COMMENT.to_bytes(2, "little")
        if not (record.startswith(END) and record.endswith(length) and comment.startswith(MARK)):
            raise DamagedCheckpoint(f"{str(path)!r} is damaged: it is cut short, or no checkpoint ({size} bytes)")
        file.seek(0)
        digest, left = hashlib.sha256(), size - COMMENT - len(length)
        while left:
            part = file.read(min(CHUNK, left))
            digest.update(part)
            left -= len(part)
    digest.update(b"\0\0")  # what torch had written in the place of the comment's length
    if digest.hexdigest().encode() != comment[len(MARK) :]:
        raise DamagedCheckpoint(f"{str(path)!r} is damaged: its content does not have the checksum it was written with")


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except Exception as error:  # a damaged table of contents makes zipfile fail in as many ways as it has lines
        raise DamagedCheckpoint(f"{str(path)!r} is damaged ({type(error).__name__}: {error})") from error
    if wrong is not None:
        raise DamagedCheckpoint(f"{str(path)!r} is damaged: {wrong} in it is not what was written")


def refuse_damaged(path: str | Path) -> None:
    """:func:`verify_checkpoint`, and what to take instead.

    Raises:
        FileNotFoundError: there is none.
        DamagedCheckpoint: names the newest intact one of its folder.
    """
    try:
        verify_checkpoint(path)
    except DamagedCheckpoint as error:
        intact, _ = newest_intact(Path(path).parent)
        where = f"the newest intact one beside it is {str(intact)!r}" if intact else "none beside it is intact"
        raise DamagedCheckpoint(f"{error}; {where}") from error


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's content; local files are verified first, code in it never runs.

    Raises:
        FileNotFoundError: there is none.
        DamagedCheckpoint: it was cut short or changed; names the newest intact one of its folder.
        BrokenFile: it carries code, or torch cannot read it.
    """
    if not is_remote(path):
        refuse_damaged(path)
    with reading(path, "checkpoint"), get_filesystem(str(path)).open(str(path), "rb") as file:
        try:
            return read_plain(file, str(path), map_location)
        except ValueError as error:  # a sentence already
            raise BrokenFile(str(error)) from error


def check_entries(content: Any, path: str | Path) -> None:
    """Refuse what Lightning could not resume from.

    Raises:
        BrokenFile: names the file, and the entry that is missing or of another type.
    """
    entries = content if isinstance(content, dict) else {}
    wrong = [f"its entry {name} is {type(entries[name]).__name__}, no {kind.__name__}"
             for name, kind in ENTRIES.items() if not isinstance(entries.get(name, kind()), kind)]  # fmt: skip
    if not wrong and "state_dict" in entries:
        wrong = [f"{name!r} in its state_dict is no tensor" for name, value in entries["state_dict"].items()
                 if not (isinstance(name, str) and isinstance(value, torch.Tensor))]  # fmt: skip
    elif not wrong:
        wrong = ["it has no state_dict"]
    if wrong:
        raise BrokenFile(
            f"{str(path)!r} is no checkpoint to resume from ({wrong[0]}): give one that a Lightning trainer wrote"
        )


def age(path: Path) -> tuple[str, float, int, str]:
    """What orders checkpoints: the start of their run, the step stored in them, the file's time, its name.

    Only the file's table of contents is read, no weights. File times alone mislead: a copied run has new ones. A file
    that cannot be read counts as newest, so that whoever looks for the newest gets to know that it is damaged.
    """
    written = path.stat().st_mtime_ns
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        step, started = content.get("global_step", -1), content.get(STARTED, "")
    except Exception:  # noqa: BLE001 (whatever it is: verifying the file says what)
        return "~", math.inf, written, path.name
    known = isinstance(step, int) and isinstance(started, str)
    return (started, step, written, path.name) if known else ("", -1, written, path.name)


def newest_intact(*folders: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole in ``folders`` and the folders in them, by :func:`age`.

    Returns:
        The file, None if there is none; and the newer ones that were passed over, with what is wrong with each.
    """
    passed_over: dict[Path, str] = {}
    files = {path for folder in folders for path in folder.rglob("*.ckpt") if path.is_file()}
    for path in sorted(files, key=age, reverse=True):
        try:
            verify_checkpoint(path)
        except (DamagedCheckpoint, OSError) as error:
            passed_over[path] = str(error)
        else:
            return path, passed_over
    return None, passed_over

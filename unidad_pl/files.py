"""Files and folders that appear whole or not at all; one kind of error for those that are not what they should be."""

from __future__ import annotations

import glob
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

ABANDONED = 3600.0  # seconds after which a temporary file or folder belongs to a process that was killed while it wrote


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` and ``~USER`` as their home folders.

        >>> expanded("runs/version_0").as_posix()
        'runs/version_0'

    Raises:
        FileNotFoundError: nobody knows whose home that is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        name = str(path).partition("/")[0]
        raise FileNotFoundError(
            f"there is no {str(path)!r}: {name!r} is the home folder of nobody here; write it out, or ./{name} for a "
            f"folder of that name"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside ``path`` for a file or a folder, which takes the place of ``path`` when the block ends well.

    Its folder is made; where ``path`` is a link to a folder, that folder is replaced. An older folder is moved aside
    first and deleted last: old or new is there at any moment. A process killed between the two leaves the old one
    beside ``path``, where :func:`moved_aside` finds it.

        >>> with replacing(Path("out.txt")) as part:
        ...     _ = part.write_text("all of it")
        >>> Path("out.txt").read_text()
        'all of it'

    Raises:
        OSError: it cannot be written; what was at ``path`` is still there.
    """
    if path.is_dir():
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    try:
        yield part
        if path.is_dir() and part.is_dir():
            _swap(part, path)
        else:
            os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A name in the folder of ``path`` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")


def _swap(part: Path, path: Path) -> None:
    """The folder ``part`` takes the place of the folder ``path``, which is deleted then."""
    aside = part.with_suffix(".old")
    os.rename(path, aside)
    try:
        os.rename(part, path)
    except BaseException as error:
        try:
            os.rename(aside, path)
        except OSError:
            raise OSError(
                f"cannot replace the folder {str(path)!r} ({error}); what was in it is in {str(aside)!r} now: rename "
                f"that back"
            ) from error
        raise
    shutil.rmtree(aside)


def moved_aside(path: Path) -> Path | None:
    """The older folder that a :func:`replacing` of ``path`` had moved aside when it was killed, before the new one took
    its place; None where nothing of the kind happened."""
    if path.exists():
        return None
    return max(_leftovers(path, "old"), key=lambda folder: folder.stat().st_mtime_ns, default=None)


def recover(path: Path) -> None:
    """Clean up after a :func:`replacing` of the folder ``path`` that was killed: the old folder takes its place again,
    and what else it left is deleted after an hour, when no other process can be at it.

    Raises:
        OSError: it cannot be moved.
    """
    path = path.resolve()
    if (aside := moved_aside(path)) is not None:
        aside.rename(path)
    for folder in _leftovers(path, "old|part"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > ABANDONED:
                shutil.rmtree(folder)


def _leftovers(path: Path, ends: str) -> list[Path]:
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.({ends})")
    beside = path.parent.glob(f".{glob.escape(path.name)}.*")
    return [folder for folder in beside if ours.fullmatch(folder.name) and folder.is_dir()]


@contextmanager
def sharing(folder: Path) -> Iterator[None]:
    """The block writes files into ``folder``, which is made, by :func:`replacing` or :func:`write_first`; so may others
    that came here. What those of them left that were killed is deleted whenever one is alone, as it begins or ends.

        >>> with sharing(Path("images")), replacing(Path("images/0.txt")) as part:
        ...     _ = part.write_text("all of it")

    Raises:
        OSError: the folder cannot be made or read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _sweep(folder, lock)
        try:
            yield
        finally:
            _sweep(folder, lock)
    finally:
        os.close(lock)


def _sweep(folder: Path, lock: int) -> None:
    """Delete temporary files that no process owns: all of them if nobody else holds the folder's ``lock``, where a
    filesystem has none those that are old; and hold it, together with others, from then on."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except OSError:
        alone = False
    for part in folder.glob(".*.part"):
        with suppress(OSError):  # what cannot be deleted is in nobody's way
            old = time.time() - part.stat().st_mtime > ABANDONED
            if (alone or old) and re.fullmatch(r"\..+\.[0-9a-f]{8}\.part", part.name) and part.is_file():
                part.unlink()
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_SH)


def write_first(path: Path, text: str) -> str:
    """Write ``text`` to ``path`` unless a file is there; of several processes that do so at once, one is the first.

    Returns:
        The content of the file, own or the first one's.

    Raises:
        OSError: it cannot be written or read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    try:
        part.write_text(text)
        try:
            os.link(part, path)  # unlike a rename, never onto another file
        except OSError:  # there is one, or the filesystem has no hard links
            if not path.exists():
                os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path.read_text()


@contextmanager
def alone_in(folder: Path, waits: Callable[[], object] = lambda: None) -> Iterator[int]:
    """Others who want the same folder, in this process or another one, wait; the lock of a killed process is free.

    ``waits`` is called before a wait. The block gets the lock's file descriptor: a process that is started with it
    (``pass_fds``) holds the lock too, until both have ended.

        >>> with alone_in(Path("runs")):
        ...     sorted(path.name for path in Path("runs").iterdir())
        ['lock']

    Raises:
        OSError: its filesystem has no locks.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waits()
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(f"the filesystem of {str(folder)!r} has no locks ({error}), by which processes share it: "
                          f"choose a folder on another one") from error  # fmt: skip
        yield file.fileno()


class BrokenFile(ValueError):
    """A file whose content is not what it should be; the message names the file, the reason and the way out.

    >>> raise BrokenFile("'shots.zip' is no zip archive: download it again")
    Traceback (most recent call last):
    ...
    unidad_pl.files.BrokenFile: 'shots.zip' is no zip archive: download it again
    """


@contextmanager
def reading(path: str | Path, what: str, way_out: str = "write or download it again") -> Iterator[None]:
    """Whatever the content of a file that others wrote makes go wrong in the block becomes one :class:`BrokenFile`.

    Missing packages, and files that are absent or may not be read, keep their own errors.

        >>> with reading("config.json", "config"):
        ...     {}["layers"]
        Traceback (most recent call last):
        ...
        unidad_pl.files.BrokenFile: 'config.json' is no readable config (KeyError: 'layers'): write or download it again

    Args:
        path: the file, or the folder.
        what: what it should be.
        way_out: what to do about it.

    Raises:
        BrokenFile: names path, reason and way out.
    """
    try:
        yield
    except (BrokenFile, FileNotFoundError, PermissionError, ImportError):
        raise
    except Exception as error:
        if mistake := mistaken(path):
            it = mistake.removeprefix(repr(str(path)))
            raise BrokenFile(f"{str(path)!r} is no readable {what}: it{it}, or {way_out}") from error
        # Only the first line: libraries go on with advice, torch's is to load the file unsafely.
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300].removesuffix(": ")
        raise BrokenFile(f"{str(path)!r} is no readable {what} ({reason}): {way_out}") from error


LFS = b"version https://git-lfs.github.com/spec/"


def mistaken(path: str | Path) -> str | None:
    """What a failed download left in the place of a file, and the way out: a Git LFS pointer, an HTML page, nothing.

        >>> _ = Path("model.safetensors").write_text("<!DOCTYPE html><html>Log in</html>")
        >>> mistaken("model.safetensors")
        "'model.safetensors' is an HTML page and not the file itself: download it again, from the file's own link"

    Returns:
        A sentence; None for any other file, and where there is none.
    """
    if not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        head = file.read(200)
    if head.startswith(LFS):
        return f"{str(path)!r} is a Git LFS pointer and not the file itself: fetch it with 'git lfs pull'"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head")):
        return f"{str(path)!r} is an HTML page and not the file itself: download it again, from the file's own link"
    return None if head else f"{str(path)!r} is empty: download it again"


def whole_number(text: str) -> int:
    """A whole number in JSON, which has no limit there.

    >>> whole_number("12")
    12

    Raises:
        ValueError: it is larger than any float, so that nothing could be done with it.
    """
    if not text or len(text) > 300:
        raise ValueError(f"a number of {len(text)} digits ({text[:10]}...) is beyond any measured one")
    return int(text)


def read_json(
    path: str | Path,
    what: str = "JSON object",
    way_out: str = "write or download it again",
    finite: bool = False,
) -> dict[str, Any]:
    """The object in a JSON file that others wrote.

    Args:
        path, what, way_out: as of :func:`reading`.
        finite: refuse ``NaN``, infinities, and numbers beyond floats.

    Raises:
        FileNotFoundError: there is no such file.
        BrokenFile: it is no JSON object, is nested deeply, or has a number in it that is refused; so is, always, a
            whole number of more than 300 digits.
    """

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)) and finite:
            raise ValueError(f"{text[:20]} is no finite number")
        return value

    if not Path(path).is_file():  # a pipe of that name would be waited for
        raise FileNotFoundError(f"there is no file {str(path)!r}, which should be the {what}: {way_out}")
    with reading(path, what, way_out):
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_float=number, parse_int=whole_number,
                             parse_constant=number)  # fmt: skip
        if not isinstance(content, dict):
            raise ValueError(f"it must be a JSON object, and is a {type(content).__name__}")
        return content

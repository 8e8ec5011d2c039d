"""Files and folders that appear whole or not at all; one kind of error for those that are not what they should be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside ``path`` for a file or a folder, which takes the place of ``path`` when the block ends well.

    Its folder is made. An older folder is moved aside first and deleted last: old or new is there at any moment.

        >>> with replacing(Path("out.txt")) as part:
        ...     _ = part.write_text("all of it")
        >>> Path("out.txt").read_text()
        'all of it'

    Raises:
        OSError: it cannot be written; what was at ``path`` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        yield part
        if path.is_dir() and part.is_dir():
            aside = part.with_suffix(".old")
            path.rename(aside)
            part.rename(path)
            shutil.rmtree(aside)
        else:
            os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


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
            raise BrokenFile(mistake) from error
        # Only the first line: libraries go on with advice, torch's is to load the file unsafely.
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
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
    try:
        with Path(path).open("rb") as file:
            head = file.read(200)
    except OSError:
        return None
    if head.startswith(LFS):
        return f"{str(path)!r} is a Git LFS pointer and not the file itself: fetch it with 'git lfs pull'"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head")):
        return f"{str(path)!r} is an HTML page and not the file itself: download it again, from the file's own link"
    return None if head else f"{str(path)!r} is empty: download it again"

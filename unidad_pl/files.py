"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

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

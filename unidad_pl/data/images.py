"""One picture: decoded as a photo viewer shows it, cut to the centre square, resized with antialiasing, as uint8."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unidad_pl.data.colours import ORIENTATION, as_shown
from unidad_pl.files import BrokenFile, reading

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS: dict[str, tuple[str, ...]] = {
    "PNG": (".png", ".apng"), "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "WEBP": (".webp",),
    "BMP": (".bmp",), "DIB": (".dib",), "GIF": (".gif",), "TIFF": (".tif", ".tiff"), "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"), "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"), "SGI": (".sgi", ".rgb", ".rgba", ".bw"), "QOI": (".qoi",),
    "PSD": (".psd",), "DDS": (".dds",), "TGA": (".tga",), "PCX": (".pcx",),
}  # fmt: skip
"""Pillow's formats that are read, and endings: pictures, none that starts a program (EPS) or is a drawing."""
WEAK = ("TGA", "PCX")
"""Formats that nearly any bytes could be: for files with their own ending only."""
MAX_BYTES = 2**29
"""A file of one picture is not larger."""
MAX_PIXELS = 179_000_000
"""A picture has no more: twice Pillow's own limit of warning, whatever another package sets that to."""
WAY_OUT = "replace it or take it out"
MARGIN = 2.5
"""A JPEG is decoded with at least so many times the pixels per side that are wanted of it, where it has more."""
MOST_THREADS = 8
"""Each may hold a large picture whole."""


@cache
def readable() -> dict[str, str]:
    """Ending of a file -> Pillow's format, of all kinds that are read with what is installed here."""
    from PIL import Image, features

    Image.init()
    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    known = {name for name in FORMATS if name in Image.OPEN and (name != "WEBP" or features.check("webp"))}
    return {ending: name for name, endings in FORMATS.items() if name in known for ending in endings}


def check_regular(path: str | Path, what: str = "picture") -> int:
    """The size of a regular file in bytes; what only looks like one (a pipe, a device) may never end.

    Raises:
        BrokenFile: it is none, or a link to nothing; names it.
        PermissionError: it may not be looked at.
    """
    try:
        seen = os.stat(path)
    except PermissionError:
        raise
    except OSError as error:
        raise BrokenFile(f"{str(path)!r} is no readable {what} ({error.strerror}): {WAY_OUT}") from error
    if not stat.S_ISREG(seen.st_mode):
        raise BrokenFile(
            f"{str(path)!r} is no readable {what} (no regular file, but a folder, pipe, socket or device): {WAY_OUT}"
        )
    return seen.st_size


def load_image(file: str | Path | bytes, resolution: int, name: str | None = None) -> Tensor:
    """One picture as a photo viewer shows it, square and resized; see :func:`~unidad_pl.data.colours.as_shown`.

    Args:
        file: a path, or a file's content.
        resolution: side of the result in pixels. The centre square is cut out and resized with antialiased bicubic;
            a large JPEG is decoded at a half, a quarter or an eighth of its size, see :data:`MARGIN`.
        name: what errors call it; None: its path.

    Returns:
        [3, resolution, resolution] uint8.

    Raises:
        BrokenFile: it is no regular file, or cannot be decoded; names it and why.
        PermissionError: it may not be read.
    """
    from PIL import Image

    shown = str(file) if name is None and not isinstance(file, bytes) else str(name)
    size = len(file) if isinstance(file, bytes) else check_regular(file)
    ending = PurePath(shown).suffix.lower()
    kinds = sorted({kind for kind in readable().values() if kind not in WEAK or ending in FORMATS[kind]})
    with reading(shown, "picture", WAY_OUT):
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes, at most {MAX_BYTES} are taken")
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=kinds) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels: too many, a decompression bomb")
            width, height = opened.size
            part = _shrink(opened, resolution)
            picture = as_shown(opened, shown)
            # A shrunk picture ends in pixels that are only partly in the large one; one that is turned has none.
            whole = picture.width * part - -width % part, picture.height * part - -height % part
            return square(picture, resolution, whole, part)


def _shrink(opened: Image, resolution: int) -> int:
    """Make a JPEG that is much larger than ``resolution`` come as 1 / 2, 1 / 4 or 1 / 8 of its size, and say which."""
    width, height = opened.size
    turned = True
    with suppress(BrokenFile), reading("EXIF block", "one"):  # of a broken one is told later
        turned = opened.getexif().get(ORIENTATION, 1) != 1
    for part in (8, 4, 2) if opened.format in ("JPEG", "MPO") else ():
        whole = width % part == 0 == height % part
        if min(width, height) >= part * MARGIN * resolution and (whole or not turned):
            opened.draft(None, (width // part, height // part))
            return part
    return 1


def square(picture: Image, resolution: int, size: tuple[int, int] | None = None, part: int = 1) -> Tensor:
    """The centre square of an RGB picture, resized with antialiased bicubic: [3, resolution, resolution] uint8.

    Args:
        picture: the picture.
        resolution: side of the result.
        size: width and height before it was shrunk; None: as it is.
        part: how often it was shrunk: the square is that of the large picture.
    """
    from PIL import Image

    width, height = picture.size if size is None else size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    x, y = left // part, top // part
    box = (left / part - x, top / part - y, (left + side) / part - x, (top + side) / part - y)
    picture = picture.crop((x, y, x + math.ceil(box[2]), y + math.ceil(box[3])))
    picture = picture.resize((resolution, resolution), Image.Resampling.BICUBIC, box)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_grey(images: Tensor) -> Tensor:
    """RGB images [..., 3, H, W] uint8 as one channel of luma [..., 1, H, W] (BT.601, as Pillow); greys stay."""
    weights = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)
    return ((images.int() * weights).sum(-3, keepdim=True) + 2**15).div(2**16, rounding_mode="floor").byte()


def image_hash(image: Tensor) -> str:
    """sha256 of a uint8 image's shape and pixels: equal for equal pictures, whatever file they came from."""
    digest = hashlib.sha256(str(tuple(image.shape)).encode())
    digest.update(image.contiguous().numpy().data)
    return digest.hexdigest()


class ImageSet(ABC):
    """Pictures in a fixed order.

        >>> from unidad_pl.data.image_sets import open_images
        >>> open_images("builtin:cats:5").load(16, [0, 3]).shape
        torch.Size([2, 3, 16, 16])

    Attributes:
        names: a name for each, for messages.
        labels: their class numbers, below 0 where one has none; or None where the place has none.
        threaded: whether :meth:`read` may be called by several threads at once.
    """

    names: list[str]
    labels: list[int] | None = None
    threaded = True

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int, resolution: int) -> Tensor:
        """Picture ``index``, [3, resolution, resolution] uint8.

        Raises:
            ValueError: it cannot be decoded; names it.
        """

    def load(self, resolution: int, indices: Iterable[int] | None = None) -> Tensor:
        """Those of ``indices``, by default all of them: [N, 3, resolution, resolution] uint8, by several threads. No
        other is decoded.

        Raises:
            ValueError: see :meth:`read`; of several the first.
        """
        wanted = range(len(self)) if indices is None else list(indices)
        with torch.inference_mode(False):  # threads are not in it, and could not write into what it made
            images = torch.empty(len(wanted), 3, resolution, resolution, dtype=torch.uint8)

        def put(row: int, index: int) -> None:
            images[row] = self.read(index, resolution)

        with ThreadPoolExecutor(_threads() if self.threaded else 1) as pool:
            for _ in pool.map(put, range(len(wanted)), wanted):
                pass
        return images


def _threads() -> int:
    """How many of them decode: as many as this process has processors, up to :data:`MOST_THREADS`."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_THREADS, own)


class Decoded(ImageSet):
    """All pictures of a small set, held in memory.

        >>> from unidad_pl.data.image_sets import open_images
        >>> len(Decoded(open_images("builtin:cats:5"), 16))
        5

    Args:
        place: the set.
        resolution: as of :meth:`ImageSet.read`, which gives this one then.
    """

    def __init__(self, place: ImageSet, resolution: int) -> None:
        self.names, self.labels = place.names, place.labels
        self.images = place.load(resolution)

    def read(self, index: int, resolution: int) -> Tensor:
        return self.images[index]

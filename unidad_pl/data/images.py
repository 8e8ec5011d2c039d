"""One picture: decoded as a photo viewer shows it, cut to the centre square, resized with antialiasing, as uint8."""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_image(file: str | Path | IO[bytes], resolution: int, name: str | None = None) -> Tensor:
    """One picture as a photo viewer shows it (EXIF turned, transparency on white), square and resized.

    Args:
        file: a path, or an open file.
        resolution: side of the result in pixels. The centre square is cut out and resized with antialiased bicubic.
        name: what errors call it; None: its path.

    Returns:
        [3, resolution, resolution] uint8.

    Raises:
        ValueError: the file cannot be decoded; names it and why.
    """
    from PIL import Image

    try:
        with Image.open(file) as opened:
            return square(as_shown(opened), resolution)
    except (
        OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError, MemoryError,
        struct.error, zlib.error, Image.DecompressionBombError,
    ) as error:  # fmt: skip
        shown = repr(str(file) if name is None else name)
        raise ValueError(f"cannot read image {shown}: {error or type(error).__name__}") from error


def as_shown(opened: Image) -> Image:
    """A PIL image as a photo viewer shows it: turned by its EXIF orientation, on white, 8 bits of RGB."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits a channel
        picture = Image.fromarray((np.asarray(picture, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def square(picture: Image, resolution: int) -> Tensor:
    """The centre square of an RGB picture, resized with antialiased bicubic: [3, resolution, resolution] uint8."""
    from PIL import Image

    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    picture = picture.resize((resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def image_hash(image: Tensor) -> str:
    """sha256 of a uint8 image's shape and pixels: equal for equal pictures, whatever file they came from."""
    return hashlib.sha256(str(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()).hexdigest()

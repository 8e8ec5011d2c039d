"""Pictures as files: a grid of images, and writing that never leaves half a PNG."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from unidad_pl.denoiser import to_uint8
from unidad_pl.files import BrokenFile, reading, replacing

END = b"\0\0\0\0IEND\xaeB`\x82"  # the last part of every PNG
LINE = 2  # pixels, before scaling, between the shots and the samples


def to_rows(images: Tensor, columns: int) -> Tensor:
    """Images [N, 3, H, W] uint8 side by side, ``columns`` in a row, black where the last row ends: [3, rows H, W']."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    padded = images.new_zeros(rows * columns, channels, height, width)
    padded[:count] = images
    grid = padded.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * height, columns * width)


def grid(samples: Tensor, shots: Tensor | None, columns: int, scale: int) -> Tensor:
    """One picture [3, H', W'] uint8: rows of shots, a white line, rows of samples, each pixel ``scale`` wide.

    Args:
        samples: [N, 3, H, W] uint8, or float in [-1, 1] (rounded).
        shots: [k, 3, H, W] likewise, or None.
        columns: images per row.
        scale: nearest-neighbour enlargement.
    """
    parts = [to_rows(as_uint8(samples), columns)]
    if shots is not None:
        line = parts[0].new_full((3, LINE, parts[0].shape[2]), 255)
        parts = [to_rows(as_uint8(shots), columns), line, *parts]
    return torch.cat(parts, 1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def as_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] rounded to uint8; uint8 ones as they are; on the CPU."""
    return (images if images.dtype == torch.uint8 else to_uint8(images)).cpu()


def write_png(image: Tensor, path: Path) -> None:
    """Write [3, H, W] uint8 to ``path`` whole or not at all.

    Raises:
        OSError: the folder cannot be made, or the file not written.
    """
    from PIL import Image

    with replacing(path) as part:
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(part, format="PNG")


def is_whole_png(path: Path) -> bool:
    """Whether ``path`` is a PNG, down to its end with the checksums it was written with: not cut short, no bit of it
    changed."""
    from PIL import Image

    if path.is_file():
        with suppress(BrokenFile), reading(path, "PNG"), path.open("rb") as file:
            file.seek(-len(END), os.SEEK_END)
            whole = file.read() == END
            Image.open(path, formats=["PNG"]).verify()
            return whole
    return False

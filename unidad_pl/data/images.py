"""Pictures from a folder: every file decoded once, centre-cropped and resized with antialiasing, kept as uint8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def list_images(root: str | Path) -> list[Path]:
    """Image files directly inside ``root``, sorted by name. Hidden files are ignored.

    Raises:
        FileNotFoundError: ``root`` is no folder, or holds no image.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {str(root)!r} does not exist or is not a folder")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    if not files:
        inside = sorted(p.name for p in folder.iterdir())[:5]
        raise FileNotFoundError(
            f"image folder {str(root)!r} holds no image ({', '.join(EXTENSIONS)}); "
            + (f"it holds {', '.join(inside)}" if inside else "it is empty")
        )
    return files


def load_image(path: str | Path, resolution: int) -> Tensor:
    """One picture as a photo viewer shows it (EXIF turned, transparency on white), square and resized.

    Args:
        path: the file.
        resolution: side of the result in pixels. The centre square is cut out and resized with antialiased bicubic.

    Returns:
        [3, resolution, resolution] uint8.

    Raises:
        ValueError: the file cannot be decoded; names it and why.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits a channel
                picture = Image.fromarray((np.asarray(picture, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("RGB")
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
            picture = picture.resize((resolution, resolution), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {str(path)!r}: {error}") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def load_folder(root: str | Path, resolution: int) -> tuple[Tensor, list[Path]]:
    """All images of a folder: ([N, 3, resolution, resolution] uint8, their N paths).

    Raises:
        FileNotFoundError: see :func:`list_images`.
        ValueError: see :func:`load_image`.
    """
    files = list_images(root)
    return torch.stack([load_image(path, resolution) for path in files]), files

"""A decoded picture as a photo viewer shows it: turned upright, in sRGB, on white, 8 bits of RGB."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from unidad_pl.files import BrokenFile, reading

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageCms import ImageCmsProfile, ImageCmsTransform

ORIENTATION = 0x0112  # EXIF tag
UNCLEAR = (1, 32)
"""A float picture whose largest value lies between these is neither one of [0, 1] nor one of [0, 255] for sure."""
ROUNDING = 3
"""A profile that moves no colour by more, of 255, is sRGB: the picture stays as it is."""
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # a profile's colour space -> Pillow's mode


def as_shown(opened: Image, name: str) -> Image:
    """``opened`` as 8 bits of RGB: turned by its EXIF orientation, by its colour profile in sRGB, clear parts on white.

    Integers of 16 bits are scaled from [0, 65535]. Of a 32-bit TIFF nobody knows: integers with a largest value from
    256 to 65535 are such 16 bits; floats up to 1 are of [0, 1], those with a largest value from 32 to 255 of [0, 255].

    Args:
        opened: any picture that Pillow opened; the first of its frames counts.
        name: what messages call it.

    Raises:
        ValueError: its numbers are of no known range.
    """
    from PIL import Image

    opened.load()  # TIFF turns itself here
    turned = _upright(opened, name)
    picture, clear = _split(_eight_bits(turned, opened.format))
    picture = _to_srgb(picture, opened.info.get("icc_profile"), name)
    if clear is None:
        return picture
    picture.putalpha(clear)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _upright(opened: Image, name: str) -> Image:
    """Turned by the orientation: the one entry of its EXIF block that is read."""
    from PIL.Image import Transpose

    turns = dict(zip(range(2, 9), (
        Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
        Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
    ), strict=True))  # fmt: skip
    try:
        with reading(f"EXIF block of {name}", "one", "the picture is taken as it lies in the file"):
            orientation = opened.getexif().get(ORIENTATION)
    except BrokenFile as error:
        rank_zero_warn(str(error))
        return opened
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return opened if turn is None else opened.transpose(turn)


def _eight_bits(picture: Image, kind: str | None) -> Image:
    """Numbers of 16 and 32 bits as 8 bits of grey, with alpha where one value stands for clear."""
    from PIL import Image

    key = picture.info.get("transparency")
    if picture.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:  # of 16 bits, Pillow keeps the upper 8
        picture = picture.copy()
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if picture.mode == "F":
        known, scale = low >= 0 and high <= 255 and not UNCLEAR[0] < high < UNCLEAR[1], 255.0 if high <= 1 else 1.0
        eight = (values * scale).round() if known else values
    else:
        certain = picture.mode != "I" or kind in ("PNG", "PPM") or high == 0 or high > 255
        known, eight = certain and low >= 0 and high <= 65535, values / 257
    if not known:
        raise ValueError(
            f"its numbers go from {low:.4g} to {high:.4g}, which is no range of 8 or 16 bits nor [0, 1] for sure: "
            f"save it with 8 bits"
        )
    grey = Image.fromarray(eight.astype(np.uint8))
    if isinstance(key, (int, float)):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _split(picture: Image) -> tuple[Image, Image | None]:
    """Colours (L, RGB, CMYK or LAB), and how opaque they are (L); None: they are everywhere."""
    if not picture.has_transparency_data:
        return picture if picture.mode in ("L", "CMYK", "LAB") else picture.convert("RGB"), None
    if picture.mode == "La":
        picture = picture.convert("LA")
    grey = picture.mode in ("L", "LA")
    picture = picture.convert("RGBA")
    return picture.convert("RGB").getchannel(0) if grey else picture.convert("RGB"), picture.getchannel("A")


def _to_srgb(picture: Image, profile: bytes | None, name: str) -> Image:
    """RGB; by the embedded colour profile, if there is one that can be used, else after a warning without it."""
    from PIL import ImageCms

    if profile:
        try:
            with reading(
                f"colour profile of {name}", "one", "the picture is taken for sRGB; save it without the profile"
            ):
                source = ImageCms.ImageCmsProfile(BytesIO(profile))
                space = source.profile.xcolor_space.strip()
                mode = MODES.get(space)
                coloured = picture.convert("RGB") if mode == "RGB" and picture.mode == "L" else picture
                if coloured.mode != mode:
                    raise ValueError(f"a profile of {space} colours in a picture of {picture.mode}")
                transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
                return picture.convert("RGB") if _changes_nothing(transform, mode) else (
                    ImageCms.applyTransform(coloured, transform) or coloured
                )  # fmt: skip
        except BrokenFile as error:
            rank_zero_warn(str(error))
    if picture.mode == "LAB":
        lab: ImageCmsProfile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        transform = ImageCms.buildTransform(lab, ImageCms.createProfile("sRGB"), "LAB", "RGB")
        return ImageCms.applyTransform(picture, transform) or picture
    return picture.convert("RGB")


def _changes_nothing(transform: ImageCmsTransform, mode: str) -> bool:
    """Whether it leaves a grid of colours as it is, but for rounding."""
    from PIL import Image, ImageCms

    if mode not in ("L", "RGB"):
        return False
    steps = np.linspace(0, 255, 17).round().astype(np.uint8)
    grid = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    before = Image.fromarray(np.ascontiguousarray(grid))
    after = ImageCms.applyTransform(before, transform) or before
    difference = np.asarray(after, dtype=int) - np.asarray(before.convert("RGB"), dtype=int)
    return bool(np.abs(difference).max() <= ROUNDING)

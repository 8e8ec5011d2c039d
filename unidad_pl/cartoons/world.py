"""The cartoon world: procedural portraits that need no download.

Four domains share one set of people, so that adaptation has a known answer:

* ``faces``: the source domain. Skin, hair, head shape, pose, eyes, mouth, clothes and background vary independently.
* ``sunglasses``: the near target. Person ``i`` is person ``i`` of ``faces``, now with dark glasses.
* ``sketches``: the style target. Person ``i`` again, as a crayon drawing: every factor is there, every texture is new.
* ``cats``: the far target. Cat ``i`` keeps pose, background and collar colour of person ``i``; the rest is a cat.

Every image is a function of ``(domain, index)`` alone, at any resolution: shapes are signed distances, and coverage is
the distance in pixels clipped to one pixel, which is anti-aliasing without supersampling.

    >>> images = render([0, 1, 2], "sunglasses", resolution=32)   # [3, 3, 32, 32] in [-1, 1]
    >>> labels = factors([0, 1, 2], "sunglasses")                 # {"glasses": tensor([1, 1, 1]), ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from unidad_pl.cartoons import shapes

FLAT = ("faces", "sunglasses", "cats")
DOMAINS = (*FLAT, "sketches")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "species": ("person", "cat"),
    "glasses": ("none", "dark"),
    "background": ("blue", "green", "yellow", "pink", "grey", "teal", "lilac", "orange"),
    "clothes": ("red", "navy", "white", "green", "black", "mustard", "violet", "sky"),
    "skin": ("porcelain", "light", "tan", "olive", "brown", "dark"),
    "hair_style": ("bald", "short", "fringe", "parted", "long", "afro", "bun", "mohawk"),
    "hair_colour": ("black", "brown", "chestnut", "blond", "red", "silver", "blue"),
    "facial_hair": ("none", "moustache", "beard"),
    "eye_colour": ("brown", "blue", "green", "grey"),
    "mouth": ("closed", "open"),
    "fur": ("ginger", "grey", "black", "white", "brown", "cream"),
    "coat": ("plain", "striped", "masked"),
}
"""Categorical factors and the names of their values. ``fur`` and ``coat`` are seen on cats only; ``skin``, hair and
``mouth`` on people only."""

RANGES: dict[str, tuple[float, float]] = {
    "shift_x": (-0.14, 0.14),
    "shift_y": (-0.08, 0.08),
    "tilt": (-0.22, 0.22),
    "yaw": (-0.10, 0.10),
    "head_width": (0.41, 0.51),
    "head_height": (0.51, 0.61),
    "eye_spacing": (0.17, 0.22),
    "smile": (-0.35, 0.9),
    "shade": (0.0, 1.0),
}
"""Continuous factors and their ranges. Lengths are in half image widths, ``tilt`` in radians."""

PERSON_ONLY = ("skin", "hair_style", "hair_colour", "facial_hair", "mouth", "smile")
CAT_ONLY = ("fur", "coat")

_PALETTES: dict[str, tuple[str, ...]] = {
    "background": ("8fb8de", "9ccc9c", "f2dc8c", "f0b6c4", "c3c7cc", "7cc4c0", "c3b1e1", "f5b880"),
    "clothes": ("c8413b", "2b3a67", "f4f1ea", "3f8f55", "2a2a2e", "d9a521", "7a4fa3", "5fb3e6"),
    "skin": ("f9dcc8", "efc3a0", "d9a377", "b98c5a", "8d5a3b", "5a3825"),
    "hair_colour": ("1f1a1c", "4a2f20", "7d4526", "e3bf6a", "b5482a", "b9bcc4", "3d6fc4"),
    "eye_colour": ("5b3a1e", "3f7fd0", "4c9a55", "7d858c"),
    "fur": ("e08a3c", "8d939b", "2e2c30", "f4efe6", "7b5236", "ead2a4"),
    "cat_eye": ("e0b93a", "5fb8e8", "7bc65a", "cfa03a"),
}
_INK, _LINE, _STROKE = (0.16, 0.13, 0.12), 0.02, 0.20  # outlines: colour and half width; distance of two strokes
_ZOOM = 0.9  # half image width in drawing units: below 1 the head fills more of the frame
_COLOURS = {
    name: torch.tensor([[int(h[i : i + 2], 16) / 255 for i in (0, 2, 4)] for h in hexes])
    for name, hexes in _PALETTES.items()
}


def _uniform(indices: np.ndarray, stream: int) -> np.ndarray:
    """Counter-based uniforms in [0, 1): splitmix64 of (index, stream), equal on all platforms."""
    with np.errstate(over="ignore"):
        z = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = z + np.uint64(stream) * np.uint64(0xD1B54A32D192ED03)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def check_domain(domain: str) -> None:
    """Raise ``ValueError`` unless ``domain`` is one of :data:`DOMAINS`."""
    if domain not in DOMAINS:
        raise ValueError(f"unknown cartoon domain {domain!r}: choose one of {', '.join(DOMAINS)}")


def factors(indices: Sequence[int] | Tensor, domain: str) -> dict[str, Tensor]:
    """Ground-truth factors of the images ``indices`` of ``domain``.

    Args:
        indices: non-negative image indices, N of them.
        domain: one of :data:`DOMAINS`.

    Returns:
        Name -> tensor [N]: int64 positions in :data:`CATEGORIES`, float32 values inside :data:`RANGES`.

    Raises:
        ValueError: unknown domain or a negative index.
    """
    check_domain(domain)
    index = np.asarray(indices, dtype=np.int64)
    if (index < 0).any():
        raise ValueError(f"cartoon indices must be >= 0, got {int(index.min())}")
    drawn: dict[str, Tensor] = {}
    for stream, (name, values) in enumerate(CATEGORIES.items()):
        drawn[name] = torch.from_numpy((_uniform(index, stream) * len(values)).astype(np.int64))
    for stream, (name, (low, high)) in enumerate(RANGES.items(), start=100):
        drawn[name] = torch.from_numpy((low + (high - low) * _uniform(index, stream)).astype(np.float32))
    drawn["species"] = torch.full_like(drawn["species"], int(domain == "cats"))
    drawn["glasses"] = torch.full_like(drawn["glasses"], int(domain == "sunglasses"))
    # Six in ten people have no facial hair; the rest split evenly.
    beard = torch.from_numpy(_uniform(index, 50))
    drawn["facial_hair"] = (beard > 0.6).long() + (beard > 0.8).long()
    return drawn


def visible(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factor -> [B] bool: whether the factor can be seen in the image at all.

    People have no fur and cats no hair; dark glasses hide the eyes; an open mouth shows how strong a smile is but not
    its sign.
    """
    person = labels["species"] == CATEGORIES["species"].index("person")
    seen = {name: torch.ones_like(person) for name in (*CATEGORIES, *RANGES)}
    seen |= dict.fromkeys(PERSON_ONLY, person) | dict.fromkeys(CAT_ONLY, ~person)
    seen["eye_colour"] = labels["glasses"] == CATEGORIES["glasses"].index("none")
    seen["smile"] = person & (labels["mouth"] == CATEGORIES["mouth"].index("closed"))
    return seen


class _Canvas:
    """Paints anti-aliased shapes, back to front, for a batch of images in head coordinates."""

    def __init__(self, factor: dict[str, Tensor], resolution: int, sketched: bool) -> None:
        self.pixel = 2.0 * _ZOOM / resolution
        axis = (torch.arange(resolution) + 0.5) * self.pixel - _ZOOM
        self.y, self.x = torch.meshgrid(axis, axis, indexing="ij")
        self.f = {k: v[:, None, None] for k, v in factor.items()}
        self.rgb = torch.zeros(len(factor["shade"]), 3, resolution, resolution)
        cos, sin = self.f["tilt"].cos(), self.f["tilt"].sin()
        dx, dy = self.x - self.f["shift_x"], self.y - self.f["shift_y"]
        self.hx, self.hy = cos * dx + sin * dy, -sin * dx + cos * dy  # head frame: moved and tilted
        self.sketched = sketched

    def paint(self, colour: Tensor, distance: Tensor, when: Tensor | float = 1.0) -> None:
        """``colour`` [N, 3] or [3] over the pixels where the signed ``distance`` is negative."""
        alpha = ((0.5 - distance / self.pixel).clamp(0, 1) * when)[:, None]
        self.rgb += alpha * (self.stroked(colour.reshape(-1, 3, 1, 1)) - self.rgb)
        if self.sketched:
            line = ((_LINE - distance.abs()) / self.pixel + 0.5).clamp(0, 1) * when
            self.rgb += line[:, None] * (torch.tensor(_INK).view(3, 1, 1) - self.rgb)

    @contextmanager
    def solid(self) -> Iterator[None]:
        """Shapes without strokes and outlines, in a sketch too: for what is smaller than either."""
        sketched, self.sketched = self.sketched, False
        yield
        self.sketched = sketched

    def stroked(self, colour: Tensor) -> Tensor:
        """``colour`` as it is, or in a sketch as slanted strokes with paper between them."""
        if not self.sketched:
            return colour
        place = ((self.x + 0.6 * self.y) / _STROKE) % 1.0
        paper = ((0.25 - (place - 0.5).abs()) * _STROKE / self.pixel + 0.5).clamp(0, 1)
        return colour + 0.75 * paper * (1 - colour)


def _is(c: _Canvas, name: str, *values: str) -> Tensor:
    wanted = torch.tensor([CATEGORIES[name].index(v) for v in values])
    return torch.isin(c.f[name], wanted).float()


def _colour(c: _Canvas, palette: str, factor: str | None = None) -> Tensor:
    return _COLOURS[palette][c.f[factor or palette].flatten()]


def _backdrop(c: _Canvas) -> None:
    """Vertical gradient; ``shade`` sets how strong."""
    base = _colour(c, "background")[:, :, None, None]
    dark = 1 - (0.10 + 0.25 * c.f["shade"])[:, None] * (c.y + 1) / 2
    c.rgb = c.stroked(base * dark)


def _shoulders(c: _Canvas, skin: Tensor) -> None:
    x, y = c.x - 0.6 * c.f["shift_x"], c.y - c.f["shift_y"]
    c.paint(skin * 0.86, shapes.box(x, y - 0.62, 0.17, 0.28, 0.05))
    c.paint(_colour(c, "clothes"), shapes.ellipse(x, y - 1.10, 0.80, 0.50))
    c.paint(skin * 0.86, shapes.ellipse(x, y - 0.63, 0.19, 0.12))


def _hair_behind(c: _Canvas, hair: Tensor) -> None:
    w, h = c.f["head_width"], c.f["head_height"]
    c.paint(hair * 0.8, shapes.box(c.hx, c.hy - 0.12, w + 0.13, h + 0.10, 0.3), _is(c, "hair_style", "long"))
    c.paint(hair * 0.9, shapes.ellipse(c.hx, c.hy + 0.22, w + 0.24, h + 0.08), _is(c, "hair_style", "afro"))
    c.paint(hair, shapes.ellipse(c.hx, c.hy + h + 0.10, 0.19, 0.17), _is(c, "hair_style", "bun"))


def _hair_front(c: _Canvas, hair: Tensor) -> None:
    """A cap over the skull, cut by a hairline that the style shapes."""
    w, h = c.f["head_width"], c.f["head_height"]
    cap = shapes.ellipse(c.hx, c.hy + 0.03, w + 0.045, h + 0.045)
    lines = {
        "short": c.hy + 0.30 - 0.25 * c.hx**2,
        "bun": c.hy + 0.33 - 0.45 * c.hx**2,
        "fringe": c.hy + 0.17 + 0.0 * c.hx,
        "parted": c.hy + 0.30 - 0.55 * (c.hx + 0.22).abs(),
        "long": c.hy + 0.30 - 0.80 * (c.hx - 0.05).abs(),
        "afro": c.hy + 0.28 - 0.35 * c.hx**2,
    }
    for style, line in lines.items():
        c.paint(hair, torch.maximum(cap, line), _is(c, "hair_style", style))
    c.paint(hair, shapes.box(c.hx, c.hy + h, 0.11, 0.20, 0.09), _is(c, "hair_style", "mohawk"))


def _eyes(c: _Canvas, iris: Tensor, brow: Tensor, cat: bool) -> None:
    white = torch.tensor([1.0, 1.0, 1.0]) if not cat else iris
    dark = torch.tensor([0.08, 0.07, 0.09])
    for side in (-1, 1):
        x, y = c.hx - side * c.f["eye_spacing"] * (1.25 if cat else 1.0) - c.f["yaw"], c.hy + 0.04
        if cat:
            c.paint(dark, shapes.ellipse(x, y, 0.145, 0.125))
            c.paint(white, shapes.ellipse(x, y, 0.125, 0.105))
            c.paint(dark, shapes.ellipse(x, y, 0.045, 0.10))
        else:
            c.paint(white, shapes.ellipse(x, y, 0.115, 0.085))
            c.paint(iris, shapes.ellipse(x - 0.3 * c.f["yaw"], y, 0.068, 0.075))
            c.paint(dark, shapes.ellipse(x - 0.3 * c.f["yaw"], y, 0.034, 0.04))
            c.paint(brow, shapes.segment(side * x, y + 0.155, -0.09, 0.0, 0.09, 0.015, 0.026))


def _mouth(c: _Canvas, skin: Tensor, hair: Tensor) -> None:
    x, y = c.hx - c.f["yaw"], c.hy - 0.31
    beard = _is(c, "facial_hair", "beard")
    chin = torch.maximum(shapes.ellipse(c.hx, c.hy, c.f["head_width"] + 0.01, c.f["head_height"] + 0.03), 0.16 - c.hy)
    c.paint(hair * 0.9, chin, beard)
    c.paint(skin, shapes.ellipse(x, y, 0.19, 0.10), beard)
    c.paint(skin * 0.72, shapes.segment(x, c.hy - 0.12, 0.0, -0.05, 0.035, 0.05, 0.024))
    lips = skin * 0.45 + torch.tensor([0.40, 0.10, 0.12])
    c.paint(lips, shapes.arc(x, y, c.f["smile"] * 0.5, 0.155, 0.034), _is(c, "mouth", "closed"))
    c.paint(lips * 0.55, shapes.ellipse(x, y, 0.13, 0.045 + 0.05 * c.f["smile"].abs()), _is(c, "mouth", "open"))
    c.paint(hair * 0.9, shapes.arc(x, y + 0.10, x.new_tensor(0.25), 0.17, 0.038), _is(c, "facial_hair", "moustache"))


def _sunglasses(c: _Canvas) -> None:
    frame, glint = torch.tensor([0.05, 0.05, 0.07]), torch.tensor([0.42, 0.44, 0.50])
    worn = (c.f["glasses"] == 1).float()
    x, y = c.hx - c.f["yaw"], c.hy + 0.03
    c.paint(frame, shapes.box(c.hx, y + 0.05, c.f["head_width"] * 0.98, 0.032, 0.02), worn)
    for side in (-1, 1):
        lens = x - side * (c.f["eye_spacing"] + 0.02)
        c.paint(frame, shapes.box(lens, y, 0.185, 0.135, 0.09), worn)
        c.paint(glint, shapes.segment(lens, y, -0.08, -0.01, -0.02, -0.07, 0.022), worn)


def _person(c: _Canvas) -> None:
    skin, hair = _colour(c, "skin"), _colour(c, "hair_colour")
    _hair_behind(c, hair)
    _shoulders(c, skin)
    for side in (-1, 1):
        c.paint(skin * 0.9, shapes.ellipse(c.hx - side * c.f["head_width"], c.hy - 0.02, 0.085, 0.12))
    c.paint(skin, shapes.ellipse(c.hx, c.hy, c.f["head_width"], c.f["head_height"]))
    with c.solid():
        _mouth(c, skin, hair)
    _hair_front(c, hair)
    with c.solid():
        _eyes(c, _colour(c, "eye_colour"), hair * 0.8, cat=False)
    _sunglasses(c)


def _cat(c: _Canvas) -> None:
    fur, pink = _colour(c, "fur"), torch.tensor([0.93, 0.60, 0.62])
    w, h = c.f["head_width"] + 0.12, c.f["head_height"] - 0.08
    x, y = c.x - 0.6 * c.f["shift_x"], c.y - c.f["shift_y"]
    pale = fur * 0.35 + 0.62
    c.paint(fur * 0.9, shapes.ellipse(x, y - 1.05, 0.62, 0.62))
    c.paint(
        _colour(c, "clothes"),
        torch.maximum(shapes.ellipse(x, y - 0.52, 0.46, 0.16), -shapes.ellipse(x, y - 0.36, 0.5, 0.16)),
    )
    for side in (-1, 1):
        ex, ey = side * c.hx - 0.36, c.hy + 0.30
        lean_x, lean_y = ex * 0.94 + ey * 0.34, ey * 0.94 - ex * 0.34
        c.paint(fur, shapes.triangle(lean_x, lean_y, 0.24, 0.48))
        c.paint(pink, shapes.triangle(lean_x, lean_y + 0.05, 0.13, 0.28))
    head = shapes.ellipse(c.hx, c.hy, w, h)
    c.paint(fur, head)
    c.paint(pale, torch.maximum(head, shapes.ellipse(c.hx, c.hy - 0.42, 0.34, 0.62)), _is(c, "coat", "masked"))
    for offset in (-0.17, 0.0, 0.17):
        stripe = shapes.segment(c.hx, c.hy + 0.33, offset, -0.16, offset * 0.8, 0.06, 0.032)
        c.paint(fur * 0.55, torch.maximum(stripe, head), _is(c, "coat", "striped"))
    _eyes(c, _colour(c, "cat_eye", "eye_colour"), fur, cat=True)
    mx = c.hx - c.f["yaw"]
    c.paint(pale, shapes.ellipse(mx - 0.10, c.hy - 0.26, 0.14, 0.105))
    c.paint(pale, shapes.ellipse(mx + 0.10, c.hy - 0.26, 0.14, 0.105))
    c.paint(pink * 0.85, shapes.triangle(mx, -(c.hy - 0.14), 0.075, 0.09))
    whisker = fur * 0.3 + torch.tensor([0.12, 0.12, 0.12])
    for side in (-1, 1):
        for slope in (-0.05, 0.07):
            c.paint(whisker, shapes.segment(side * mx, c.hy - 0.25, 0.20, 0.0, 0.52, slope, 0.014))


def render(indices: Sequence[int] | Tensor, domain: str, resolution: int = 32) -> Tensor:
    """Draw the images ``indices`` of ``domain``.

    Args:
        indices: non-negative image indices, N of them.
        domain: one of :data:`DOMAINS`.
        resolution: image side in pixels, at least 8.

    Returns:
        Images [N, 3, resolution, resolution], float32 in [-1, 1].

    Raises:
        ValueError: unknown domain, a negative index, or a resolution below 8.
    """
    if resolution < 8:
        raise ValueError(f"cartoons need a resolution of at least 8 pixels, got {resolution}")
    canvas = _Canvas(factors(indices, domain), resolution, domain == "sketches")
    _backdrop(canvas)
    (_cat if domain == "cats" else _person)(canvas)
    return canvas.rgb.clamp(0, 1) * 2 - 1

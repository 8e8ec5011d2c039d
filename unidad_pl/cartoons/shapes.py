"""Signed distances to the shapes that cartoons are made of: negative inside, in the unit of the coordinates."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ellipse(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """Signed distance to an ellipse, first order: k0 (k0 - 1) / k1 with k0 = |p/r|, k1 = |p/r^2|."""
    k0 = ((x / rx) ** 2 + (y / ry) ** 2).sqrt()
    k1 = ((x / rx**2) ** 2 + (y / ry**2) ** 2).sqrt().clamp_min(1e-6)
    return k0 * (k0 - 1) / k1


def box(x: Tensor, y: Tensor, hx: Tensor | float, hy: Tensor | float, radius: float) -> Tensor:
    """A rectangle of half sides ``hx`` and ``hy`` with round corners."""
    qx, qy = x.abs() - hx + radius, y.abs() - hy + radius
    return (qx.clamp_min(0) ** 2 + qy.clamp_min(0) ** 2).sqrt() + torch.maximum(qx, qy).clamp_max(0) - radius


def segment(x: Tensor, y: Tensor, ax: float, ay: float, bx: float, by: float, radius: float) -> Tensor:
    """A line from a to b with round ends."""
    t = (((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)).clamp(0, 1)
    return ((x - ax - t * (bx - ax)) ** 2 + (y - ay - t * (by - ay)) ** 2).sqrt() - radius


def arc(x: Tensor, y: Tensor, bend: Tensor, half: float, radius: float) -> Tensor:
    """The parabola y = bend * (half - x^2/half), |x| <= half, as a line of the given radius."""
    cx = x.clamp(-half, half)
    slope = -2 * bend * cx / half
    dy = (y - bend * (half - cx**2 / half)) / (1 + slope**2).sqrt()
    return ((x - cx) ** 2 + dy**2).sqrt() - radius


def triangle(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    """Isosceles triangle, apex up at (0, -height), base from (-width, 0) to (width, 0)."""
    side = (x.abs() * height + (y + height) * -width) / math.hypot(width, height)
    return torch.maximum(side, y)

"""Tiny feature networks, and what tests of metrics, callbacks and other folders share."""

from __future__ import annotations

import math
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def refused(message: str, call: Callable[..., Any], *given: Any, error: Any = ValueError, **options: Any) -> None:
    """``call(*given, **options)`` ends in ``error`` with a text that ``message`` matches."""
    with pytest.raises(error, match=message):
        call(*given, **options)


class TinyFeatures(nn.Module):
    """A random two-layer convolutional network: images [N, 3, H, W] -> [N, width]."""

    name = "tiny"

    def __init__(self, width: int = 8, seed: int = 0, spatial: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(16, 3, 3, 3, generator=generator) / 5)
        self.second = nn.Parameter(torch.randn(width, 16, generator=generator) / 4)
        self.dropout = nn.Dropout(0.5)  # would make features random, were the module used in training mode
        self.spatial = spatial
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        x = self.dropout(nn.functional.conv2d(images, self.first, padding=1).relu())
        return x.flatten(1) if self.spatial else x.mean((2, 3)) @ self.second.T


def images(count: int, size: int = 8, seed: int = 0) -> Tensor:
    """Random images [count, 3, size, size] in [-1, 1] that differ in colour and contrast."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(count, 3, 1, 1, generator=generator) * 1.2 - 0.6
    return (colour + 0.4 * torch.randn(count, 3, size, size, generator=generator)).clamp(-1, 1)


class WordVectors(nn.Module):
    """Texts -> sums of a fixed random vector of each word."""

    name = "words"

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.width, self.seed = width, seed

    def forward(self, texts: list[str]) -> Tensor:
        return torch.stack([torch.stack([self._of(word) for word in text.split()]).sum(0) for text in texts])

    def _of(self, word: str) -> Tensor:
        return torch.randn(self.width, generator=torch.Generator().manual_seed(self.seed + sum(map(ord, word))))


def cut_off(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """An empty hub folder in ``folder``, and downloads that fail as they do without a network."""

    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    patch.setattr(torch.hub, "download_url_to_file", fail)
    patch.setenv("TORCH_HOME", str(folder))
    patch.setattr(torch.hub, "_hub_dir", None)


def close(a: Any, b: Any, rel: float = 1e-5, least: float = 1e-9) -> bool:
    """Whether nested values are equal up to rounding; NaN is equal to NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], rel, least) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(close(x, y, rel, least) for x, y in zip(a, b, strict=True))
    if isinstance(a, (float, Tensor)) and isinstance(b, (float, Tensor)):
        x, y = float(a), float(b)
        return (math.isnan(x) and math.isnan(y)) or math.isclose(x, y, rel_tol=rel, abs_tol=least)
    return bool(a == b)


class Pixels(nn.Flatten):
    """Pixels as features: nothing is rounded, so values must agree to the last digits of float64."""

    name = "pixels"

"""Precision, recall, density and coverage of generated features among reference features (Naeem et al. 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unidad_pl.checks import check_whole
from unidad_pl.metrics.gather import double
from unidad_pl.metrics.two_sample import TwoSample, check_pair

NAMES = ("precision", "recall", "density", "coverage")
CHUNK = 2048  # rows of a distance matrix at a time: 0.8 GB in float64 for 50 000 images


TIE = 1e-9
"""Where samples are copies of references many distances are equal to a radius: these are not inside, however they are
rounded."""


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of all pairs: [n, D], [m, D] -> [n, m]; rows must be near 0, or rounding shows."""
    return torch.addmm(y.square().sum(1), x, y.T, alpha=-2).add_(x.square().sum(1, keepdim=True)).clamp_min_(0)


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """Squared distance of every row [n, D] to its ``neighbours``-th nearest other row, and no tie: [n]."""
    most = neighbours + 1  # a row is the nearest one to itself
    found = [_squared(part, x).topk(most, dim=1, largest=False).values[:, -1] for part in x.split(CHUNK)]
    return torch.cat(found) * (1 - TIE)


def prdc(x: Tensor, y: Tensor, neighbours: int = 5) -> dict[str, float]:
    """How well generated features ``x`` [n, D] cover reference features ``y`` [m, D], in float64.

    A ball around each image reaches to its ``neighbours``-th nearest image of the same set.
    precision: share of generated images inside a reference ball; recall: share of reference images inside a generated
    ball; density: mean number of reference balls a generated image is in, over ``neighbours``; coverage: share of
    reference balls that hold a generated image.

    Raises:
        ValueError: shapes that do not match, or no more than ``neighbours`` images in one of the sets.
    """
    check_whole(1, neighbours=neighbours)
    check_pair(x, y, f"PRDC with {neighbours} neighbours", least=neighbours + 1)
    x, y = double(x), double(y)
    centre = y.mean(0)
    x, y = x - centre, y - centre
    radii_x, radii_y = _radii(x, neighbours), _radii(y, neighbours)
    inside, nearest = [], radii_y.new_full((len(y),), math.inf)
    recalled = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for part, radii in zip(x.split(CHUNK), radii_x.split(CHUNK), strict=True):
        distances = _squared(part, y)
        inside.append((distances < radii_y).sum(1))
        nearest = torch.minimum(nearest, distances.amin(0))
        recalled |= (distances < radii[:, None]).any(0)
    balls = torch.cat(inside).double()
    return {
        "precision": float((balls > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(balls.mean() / neighbours),
        "coverage": float((nearest < radii_y).double().mean()),
    }


class PRDC(TwoSample):
    """:func:`prdc` as a metric: ``update(features, real)``, then ``compute()``: a dict of float64 scalars.

        >>> metric, reference = PRDC(neighbours=3), torch.randn(50, 4)
        >>> metric.update(reference, real=True)
        >>> metric.update(reference[:10], real=False)
        >>> found = metric.compute()
        >>> float(found["precision"]), bool(found["coverage"] < 1)  # all of it real, not all of the real
        (1.0, True)

    Args:
        neighbours: see :func:`prdc`.
        kwargs: for :class:`~unidad_pl.metrics.two_sample.TwoSample`.

    Raises:
        ValueError: ``neighbours`` below 1.
    """

    higher_is_better = True

    def __init__(self, neighbours: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_whole(1, neighbours=neighbours)
        self.neighbours, self.least = neighbours, neighbours + 1

    def value(self, generated: Tensor, reference: Tensor) -> dict[str, Tensor]:
        return {name: self.scalar(value) for name, value in prdc(generated, reference, self.neighbours).items()}

    def undefined(self) -> dict[str, Tensor]:
        return dict.fromkeys(NAMES, self.scalar(math.nan))

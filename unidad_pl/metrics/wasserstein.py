"""Wasserstein distances: of one number at a time, and of features along many random directions."""

from __future__ import annotations

import torch
from torch import Tensor

from unidad_pl.checks import check_whole
from unidad_pl.metrics.gather import double
from unidad_pl.metrics.two_sample import check_pair


def wasserstein(x: Tensor, y: Tensor) -> Tensor:
    """1-Wasserstein distance between the columns of ``x`` [n, K] and of ``y`` [m, K] -> [K] float64.

    It is the area between the two empirical distribution functions, exact for any n and m.

        >>> wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]]))
        tensor([2.], dtype=torch.float64)

    Raises:
        ValueError: an empty set, or another number of columns.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(f"expected [n, K] and [m, K] with at least one row, got {tuple(x.shape)}, {tuple(y.shape)}")
    a, b = double(x).T.contiguous().sort(1).values, double(y).T.contiguous().sort(1).values
    places = torch.cat([a, b], 1).sort(1).values
    below = [torch.searchsorted(own, places[:, :-1].contiguous(), right=True).double() / own.shape[1] for own in (a, b)]
    return ((below[0] - below[1]).abs() * places.diff(dim=1)).sum(1)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 500, seed: int = 0) -> float:
    """Mean 1-Wasserstein distance of features ``x`` [n, D] and ``y`` [m, D] along random unit directions.

    Unlike a Frechet distance it sees more than means and covariances: two clusters where one is wanted.

    Args:
        x: features of generated images.
        y: features of reference images.
        directions: how many.
        seed: of their draw.

    Raises:
        ValueError: fewer than 2 rows, or shapes that do not match.
    """
    check_pair(x, y, "the sliced Wasserstein distance")
    check_whole(1, 1_000_000, directions=directions)
    axes = torch.randn(x.shape[1], directions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    axes = (axes / axes.norm(dim=0)).to(x.device)
    return float(wasserstein(double(x) @ axes, double(y) @ axes).mean())

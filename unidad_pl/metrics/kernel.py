"""Kernel Inception distance: the squared maximum mean discrepancy of a cubic kernel, unbiased for few images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from unidad_pl.checks import check_whole
from unidad_pl.metrics.gather import double
from unidad_pl.metrics.two_sample import TwoSample, check_pair

WHOLE = 10_000  # images whose whole kernel matrix is computed: 0.8 GB


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """``(x . y / D + 1)^3`` of all pairs: [n, D], [m, D] -> [n, m] (Binkowski et al. 2018)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def unbiased_mmd2(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor) -> float:
    """MMD^2 from kernel matrices [n, n], [n, m], [m, m]; may be negative, being unbiased."""
    n, m = k_xy.shape
    within_x = (k_xx.sum() - k_xx.trace()) / (n * (n - 1))
    within_y = (k_yy.sum() - k_yy.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * k_xy.mean())


def kid(x: Tensor, y: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation of MMD^2 over random subsets, in float64.

    Subsets are drawn as torch-fidelity draws them, so the values are equal to its values.

    Args:
        x: [n, D] features of generated images.
        y: [m, D] of reference images.
        subsets: how many subsets.
        subset_size: their size; ``min(subset_size, n, m)`` is used.
        seed: of the draws.

    Raises:
        ValueError: fewer than 2 rows, shapes that do not match, or ``subsets`` or ``subset_size`` out of range.
    """
    check_pair(x, y, "KID")
    _check(subsets, subset_size, seed)
    x, y = double(x), double(y)
    size = min(subset_size, len(x), len(y))
    if size == len(x) == len(y):  # every subset is the whole set
        return unbiased_mmd2(polynomial_kernel(x, x), polynomial_kernel(x, y), polynomial_kernel(y, y)), 0.0
    # Subsets overlap: one kernel matrix of all images is cheaper than a hundred small ones, while it fits.
    whole = polynomial_kernel(torch.cat([x, y]), torch.cat([x, y])) if len(x) + len(y) <= WHOLE else None
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        i = torch.from_numpy(random.choice(len(x), size, replace=False)).to(x.device)
        j = torch.from_numpy(random.choice(len(y), size, replace=False)).to(x.device)
        if whole is None:
            kernels = [polynomial_kernel(a, b) for a, b in ((x[i], x[i]), (x[i], y[j]), (y[j], y[j]))]
        else:
            j = j + len(x)
            kernels = [whole[a][:, b] for a, b in ((i, i), (i, j), (j, j))]
        values.append(unbiased_mmd2(*kernels))
    return float(np.mean(values)), float(np.std(values))


def _check(subsets: int, subset_size: int, seed: int) -> None:
    check_whole(1, subsets=subsets)
    check_whole(2, subset_size=subset_size)
    check_whole(0, 2**32 - 1, seed=seed)


class KID(TwoSample):
    """The mean of :func:`kid` as a metric: ``update(features, real, indices)``, then ``compute()``: a float64 scalar.

        >>> metric = KID(subset_size=20)
        >>> metric.update(torch.randn(50, 4), real=True)
        >>> metric.update(torch.randn(40, 4) + 5, real=False)
        >>> bool(metric.compute() > 0)
        True

    Args:
        subsets: see :func:`kid`.
        subset_size: see :func:`kid`.
        seed: see :func:`kid`.
        kwargs: for :class:`~unidad_pl.metrics.two_sample.TwoSample`.

    Raises:
        ValueError: a number out of range.
    """

    higher_is_better = False
    least = 2

    def __init__(self, subsets: int = 100, subset_size: int = 1000, seed: int = 2020, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check(subsets, subset_size, seed)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def value(self, generated: Tensor, reference: Tensor) -> Tensor:
        return self.scalar(kid(generated, reference, self.subsets, self.subset_size, self.seed)[0])

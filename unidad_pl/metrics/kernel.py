"""Squared maximum mean discrepancies: KID, of a cubic kernel and unbiased for few images; CMMD's, of a Gaussian one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unidad_pl.checks import check_given, check_positive, check_whole
from unidad_pl.metrics.gather import double
from unidad_pl.metrics.two_sample import TwoSample, check_pair

ROWS = 1024  # of a kernel matrix at a time: 0.4 GB in float64 for 50 000 images


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
    random = np.random.RandomState(seed)
    draws = [[random.choice(len(one), size, replace=False) for one in (x, y)] for _ in range(subsets)]
    i, j = (torch.from_numpy(np.stack(drawn)).to(x.device) for drawn in zip(*draws, strict=True))
    # Subsets overlap: one kernel matrix of all images is cheaper than many small ones, up to a number of images.
    if len(x) ** 2 + len(x) * len(y) + len(y) ** 2 < 3 * subsets * size**2:
        values = _mmd2_of_all(x, y, i, j)
    else:
        pairs = [(x[a], y[b]) for a, b in zip(i, j, strict=True)]
        values = [unbiased_mmd2(*(polynomial_kernel(*p) for p in ((a, a), (a, b), (b, b)))) for a, b in pairs]
    return float(np.mean(values)), float(np.std(values))


def _mmd2_of_all(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> list[float]:
    """:func:`unbiased_mmd2` of subsets with rows ``i`` of ``x`` and ``j`` of ``y``, each [subsets, size]."""
    size = i.shape[1]
    of_x, of_y = (x.new_zeros(len(rows), len(one)).scatter_(1, rows, 1) for one, rows in ((x, i), (y, j)))

    def mean(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor) -> Tensor:
        """The mean of each subset's kernel matrix, without its diagonal where both sides are the same."""
        total = x.new_zeros(len(i))
        for rows, chosen in zip(a.split(ROWS), of_a.split(ROWS, 1), strict=True):
            total += (chosen @ polynomial_kernel(rows, b) * of_b).sum(1)
        if a is not b:
            return total / size**2
        own = (a.square().sum(1) / a.shape[1] + 1) ** 3
        return (total - of_a @ own) / (size * (size - 1))

    return (mean(x, of_x, x, of_x) + mean(y, of_y, y, of_y) - 2 * mean(x, of_x, y, of_y)).tolist()


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


def gaussian_mmd(x: Tensor, y: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """MMD^2 of ``exp(-|x - y|^2 / (2 sigma^2))`` on rows of length 1, times ``scale``, in float64.

    With CLIP's embeddings of pictures it is CMMD (Jayasumana et al. 2024). As its authors do, the mean is over all
    pairs, a row with itself among them: >= 0, and biased by less than ``2 scale / (n sigma^2)``.

    Args:
        x: [n, D] features of generated images, of any length.
        y: [m, D] of reference images.
        sigma: width of the kernel.
        scale: a factor that makes the numbers readable.

    Raises:
        ValueError: no rows, shapes that do not match, or a number out of range.
    """
    check_pair(x, y, "the Gaussian MMD", least=1)
    check_positive(sigma=sigma, scale=scale)
    x, y = F.normalize(double(x), dim=1), F.normalize(double(y), dim=1)

    def mean(a: Tensor, b: Tensor) -> Tensor:  # of the kernel less 1, which differs from it in digits that cancel
        parts = [torch.expm1((part @ b.T - 1).clamp_max(0) / sigma**2).sum() for part in a.split(ROWS)]
        return torch.stack(parts).sum() / (len(a) * len(b))

    return scale * float((mean(x, x) + mean(y, y) - 2 * mean(x, y)).clamp_min(0))


class GaussianMMD(TwoSample):
    """:func:`gaussian_mmd` as a metric: ``update(features, real)``, then ``compute()``: a float64 scalar.

        >>> metric = GaussianMMD()
        >>> metric.update(torch.randn(50, 4), real=True)
        >>> metric.update(torch.randn(40, 4) + 5, real=False)
        >>> bool(metric.compute() > 0)
        True

    Args:
        sigma: see :func:`gaussian_mmd`.
        scale: see :func:`gaussian_mmd`.
        kwargs: for :class:`~unidad_pl.metrics.two_sample.TwoSample`.

    Raises:
        ValueError: a number out of range.
    """

    higher_is_better = False
    least = 1

    def __init__(self, sigma: float = 10.0, scale: float = 1000.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_given(sigma=sigma, scale=scale)
        check_positive(sigma=sigma, scale=scale)
        self.sigma, self.scale = sigma, scale

    def value(self, generated: Tensor, reference: Tensor) -> Tensor:
        return self.scalar(gaussian_mmd(generated, reference, self.sigma, self.scale))

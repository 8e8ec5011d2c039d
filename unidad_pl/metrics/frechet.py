"""The Frechet distance between Gaussians fitted to two sets of features: FID, if the features are Inception's."""

from __future__ import annotations

import torch
from torch import Tensor

from unidad_pl.metrics.gather import double
from unidad_pl.metrics.two_sample import TwoSample, check_pair


def _factor(centred: Tensor) -> Tensor:
    """R with at most D rows and ``R^T R = cov``: the rows over sqrt(n - 1), reduced by QR if there are more than D."""
    rows = centred / (len(centred) - 1) ** 0.5
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """``|mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)`` (Heusel et al. 2017), in float64.

    With ``S = R^T R`` the last trace is the sum of the singular values of ``R_x R_y^T``. No covariance is formed and no
    root of a nearly zero eigenvalue taken, so the result is exact for rank-deficient covariances too (fewer images than
    features, the usual few-shot case) and costs a decomposition of ``min(n, D) x min(m, D)``.

    Args:
        x: [n, D] features of one set.
        y: [m, D] of the other.

    Returns:
        The distance, >= 0. Its bias depends on n and m: compare only values of equal n and m.

    Raises:
        ValueError: fewer than 2 rows, shapes that do not match, or values that are not finite.
    """
    check_pair(x, y, "the Frechet distance")
    x, y = double(x), double(y)
    mu_x, mu_y = x.mean(0), y.mean(0)
    r_x, r_y = _factor(x - mu_x), _factor(y - mu_y)
    cross = torch.linalg.svdvals(r_x @ r_y.T).sum()
    distance = (mu_x - mu_y).square().sum() + r_x.square().sum() + r_y.square().sum() - 2 * cross
    return float(distance.clamp_min(0))


class Frechet(TwoSample):
    """:func:`frechet_distance` as a metric: ``update(features, real)``, then ``compute()``: a float64 scalar.

        >>> metric, reference = Frechet(), torch.randn(50, 4)
        >>> metric.update(reference, real=True)
        >>> metric.update(reference + 0.5, real=False)
        >>> round(float(metric.compute()), 4)  # four times 0.5^2: only the means differ
        1.0

    Sets of other sizes have another bias: compare only values of equal sizes.
    """

    higher_is_better = False
    least = 2

    def value(self, generated: Tensor, reference: Tensor) -> Tensor:
        return self.scalar(frechet_distance(generated, reference))

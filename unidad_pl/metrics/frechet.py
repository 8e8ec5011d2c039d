"""The Frechet distance between Gaussians fitted to two sets of features: FID, if the features are Inception's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unidad_pl.files import expanded, reading
from unidad_pl.metrics.gather import double
from unidad_pl.metrics.two_sample import TwoSample, check_pair

SYMMETRIC = 1e-4
"""Of the largest entry: how far a covariance in a file may be from symmetric, or from having no negative variance."""


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features, in float64.

        >>> x, y = torch.randn(2, 50, 4)
        >>> Gaussian.of(x).distance(Gaussian.of(y)) == frechet_distance(x, y)
        True

    Attributes:
        mean: [D].
        root: R [r, D], r at most D, with ``R^T R`` the covariance.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """The Gaussian of features [n, D], n >= 2."""
        rows = double(features)
        mean = rows.mean(0)
        rows = (rows - mean) / (len(rows) - 1) ** 0.5
        return cls(mean, torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows)

    def distance(self, other: Gaussian) -> float:
        """The squared Frechet distance, >= 0; see :func:`frechet_distance`."""
        mean, root = other.mean.to(self.mean.device), other.root.to(self.root.device)
        cross = torch.linalg.svdvals(self.root @ root.T).sum()
        spread = self.root.square().sum() + root.square().sum()
        return float(((self.mean - mean).square().sum() + spread - 2 * cross).clamp_min(0))


def read_statistics(path: str | Path) -> Gaussian:
    """The statistics that clean-fid, torch-fidelity, pytorch-fid and many released models write: an ``.npz`` with the
    mean ``mu`` [D] and the covariance ``sigma`` [D, D] of features. Plain numbers only are read.

    Raises:
        FileNotFoundError: there is no such file.
        BrokenFile: it is none, or what it holds is no mean and covariance.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}, which should hold the statistics of a reference")
    with reading(path, "file of FID statistics", "give an .npz with mu [D] and sigma [D, D]"):
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            names = list(file) if isinstance(file, np.lib.npyio.NpzFile) else []
            if absent := {"mu", "sigma"} - set(names):
                raise ValueError(f"it has no {' and no '.join(sorted(absent))}, only {', '.join(names) or 'one array'}")
            mean, covariance = (file[name] for name in ("mu", "sigma"))
        shapes = f"mu {mean.dtype} {mean.shape} and sigma {covariance.dtype} {covariance.shape}"
        numbers = all(np.issubdtype(one.dtype, np.floating) for one in (mean, covariance))
        if not numbers or mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
            raise ValueError(f"it holds {shapes}")
        return Gaussian(*_checked(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()))


def _checked(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and a root of the covariance."""
    if not bool(mean.isfinite().all()) or not bool(covariance.isfinite().all()):
        raise ValueError("it holds NaN or infinite values")
    most = SYMMETRIC * float(covariance.abs().max())
    if float((covariance - covariance.T).abs().max()) > most:
        raise ValueError("sigma is not symmetric")
    covariance = (covariance + covariance.T) / 2
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return mean, lower.T.contiguous()
    variances, axes = torch.linalg.eigh(covariance)  # of fewer images than features
    if float(variances[0]) < -most:
        raise ValueError(f"sigma is no covariance: it has a variance of {float(variances[0]):.3g}")
    return mean, variances.clamp_min(0).sqrt()[:, None] * axes.T


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
    return Gaussian.of(x).distance(Gaussian.of(y))


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

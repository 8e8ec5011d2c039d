"""Noise schedules as values: every function returns a plain tensor of sigmas (or of alpha-bar), nothing has state.

Convention everywhere: ``x = x0 + sigma * eps``. A DDPM schedule is the same thing seen through
``sigma = sqrt((1 - abar) / abar)`` and ``abar = 1 / (1 + sigma^2)`` (:func:`sigma_from_abar`, :func:`abar_from_sigma`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unidad_pl.checks import check_at_least, check_given, check_positive, check_whole

MOST_STEPS, MOST_ENTRIES, MOST_SIGMA = 10_000, 100_000, 1e6
"""Of a sampler, of a table, and the largest sigma that is no mistake."""


def karras(n: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022, eq. 5: sigmas evenly spaced in ``sigma^(1/rho)``.

    Returns:
        [n] float32, ascending from ``sigma_min`` to ``sigma_max``. One entry (``n == 1``) is ``sigma_max``.

    Raises:
        ValueError: ``n < 1``, or not ``0 < sigma_min <= sigma_max``, or ``rho <= 0``; or one of them is not finite.
    """
    check_whole(1, MOST_ENTRIES, n=n)
    check_given(rho=rho)
    check_positive(rho=rho)
    _check_range(sigma_min=sigma_min, sigma_max=sigma_max)
    ramp = torch.linspace(1, 0, n) if n > 1 else torch.zeros(1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def log_linear(n: int, sigma_max: float = 80.0, sigma_end: float = 0.5) -> Tensor:
    """The student's sigmas (paper, few-step schedule): log-linear, both ends included.

    Returns:
        [n] float64, descending from ``sigma_max`` to ``sigma_end``; ``n == 1`` gives ``sigma_max`` alone.

    Raises:
        ValueError: ``n < 1``, or not ``0 < sigma_end <= sigma_max``; or one of them is not finite.
    """
    check_whole(1, MOST_STEPS, n=n)
    _check_range(sigma_end=sigma_end, sigma_max=sigma_max)
    u = torch.linspace(0, 1, n, dtype=torch.float64)
    return torch.exp((1 - u) * math.log(sigma_max) + u * math.log(sigma_end))


FLOW_MAX = 0.999
"""The last time of a flow network: at 1 there is nothing of the image left, and sigma is infinite."""


def flow_sigmas(u: Tensor, shift: float = 1.0) -> Tensor:
    """Sigmas of flow-matching times: ``t = shift u / (1 + (shift - 1) u)``, at most :data:`FLOW_MAX`, and
    ``sigma = t / (1 - t)``.

        >>> flow_sigmas(torch.tensor([0.5, 1.0]))
        tensor([  1., 999.])

    Args:
        u: times before the shift, in (0, 1]; any shape.
        shift: of the model's scheduler; above 1 towards the noise (Esser et al. 2024, eq. 23).
    """
    u = u.double()
    t = (shift * u / (1 + (shift - 1) * u)).clamp_max(FLOW_MAX)
    return (t / (1 - t)).float()


def linear_abar(n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """DDPM's cumulative signal variance for linearly spaced betas: ``abar_t = prod_{s<=t} (1 - beta_s)``.

    Returns:
        [n] float32, descending; computed in float64 and rounded once.

    Raises:
        ValueError: ``n < 1``, or a beta outside of [0, 1).
    """
    check_whole(1, MOST_ENTRIES, n=n)
    check_given(beta_start=beta_start, beta_end=beta_end)
    check_at_least(0, 0.9999, beta_start=beta_start, beta_end=beta_end)
    betas = torch.linspace(beta_start, beta_end, n, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0).float()


def sigma_from_abar(abar: Tensor) -> Tensor:
    """``sigma = sqrt((1 - abar) / abar)``; inverse of :func:`abar_from_sigma`. Any shape, values in (0, 1]."""
    return ((1 - abar) / abar).sqrt()


def abar_from_sigma(sigma: Tensor) -> Tensor:
    """``abar = 1 / (1 + sigma^2)``; inverse of :func:`sigma_from_abar`. Any shape, values >= 0."""
    return 1 / (1 + sigma**2)


def index_range(n: int, low: float, high: float) -> tuple[int, int]:
    """First and last index (both included) of the part ``[low, high]`` of a table of ``n`` entries.

    ``index_range(1000, 0.02, 0.98) == (20, 980)``, the range of the DMD draws; ``(0, 1)`` is the whole table.

    Raises:
        ValueError: not ``0 <= low <= high <= 1``.
    """
    check_whole(1, n=n)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"an index range needs 0 <= low <= high <= 1, got [{low}, {high}]")
    return min(int(round(low * n, 6)), n - 1), min(int(round(high * n, 6)), n - 1)


def _check_range(**sigmas: float) -> None:
    check_given(**sigmas)
    check_positive(MOST_SIGMA, **sigmas)
    low, high = sigmas.values()
    if low > high:
        raise ValueError(f"{' must be at most '.join(sigmas)}, got {low} and {high}")

"""Wasserstein distances against scipy and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import wasserstein_distance

from unidad_pl.metrics.wasserstein import sliced_wasserstein, wasserstein


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (5, 12), (40, 3)])
def test_each_column_equals_scipys(n: int, m: int) -> None:
    x, y = torch.randn(n, 4), torch.randn(m, 4).round(decimals=1) + 0.5
    expected = [wasserstein_distance(x[:, k].double(), y[:, k].double()) for k in range(4)]
    torch.testing.assert_close(wasserstein(x, y), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_shift_is_its_mean_length_along_directions() -> None:
    x = torch.randn(50, 300)
    shift = torch.zeros(300)
    shift[7] = 3.0
    expected = 3.0 * math.sqrt(2 / math.pi / 300)  # E|u_1| of a unit vector in D dimensions
    assert sliced_wasserstein(x, x + shift, directions=20_000) == pytest.approx(expected, rel=0.02)
    assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0.0, abs=1e-12)


def test_it_sees_what_a_frechet_distance_does_not() -> None:
    """Two clusters and one Gaussian of the same mean and covariance."""
    from unidad_pl.metrics.frechet import frechet_distance

    one = torch.randn(4000, 2, dtype=torch.float64)
    sign = torch.randint(0, 2, (4000, 1)).double() * 2 - 1
    two = torch.cat([sign + 0.05 * torch.randn(4000, 1).double(), torch.randn(4000, 1).double()], 1)
    assert frechet_distance(one, two) < 0.01
    assert sliced_wasserstein(one, two) > 5 * sliced_wasserstein(one, torch.randn(4000, 2, dtype=torch.float64))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        wasserstein(torch.ones(0, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="at least 2"):
        sliced_wasserstein(torch.ones(1, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="directions"):
        sliced_wasserstein(torch.ones(3, 2), torch.ones(3, 2), directions=0)

"""Sigma tables against the authors' recorded tables, diffusers and closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from unidad_pl.schedules import abar_from_sigma, index_range, karras, linear_abar, log_linear, sigma_from_abar

SETUP = torch.load(Path(__file__).parent / "fixtures" / "official_step" / "setup.pt", weights_only=True)


def test_karras_is_the_recorded_table() -> None:
    table = karras(1000, 0.002, 80.0, 7.0)
    assert table.dtype == torch.float32
    assert torch.equal(table, SETUP["karras_sigmas"])


def test_karras_closed_form_and_ends() -> None:
    table = karras(5, 0.1, 10.0, 3.0)
    low, high = 0.1 ** (1 / 3), 10 ** (1 / 3)
    expected = [(low + i / 4 * (high - low)) ** 3 for i in range(5)]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=1e-6, atol=0)
    assert karras(1).tolist() == pytest.approx([80.0], rel=1e-6)  # float32 powers


def test_linear_abar_is_the_recorded_table() -> None:
    assert torch.equal(linear_abar(), SETUP["alphas_cumprod"])


def test_linear_abar_against_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=100, beta_start=2e-4, beta_end=0.03, beta_schedule="linear")
    torch.testing.assert_close(linear_abar(100, 2e-4, 0.03), theirs.alphas_cumprod, rtol=2e-6, atol=0)


def test_log_linear_of_three_steps() -> None:
    sigmas = log_linear(3)
    assert sigmas.dtype == torch.float64
    assert sigmas.tolist() == pytest.approx([80, math.sqrt(80 * 0.5), 0.5], rel=1e-14)
    assert sigmas[1].item() == pytest.approx(6.325, abs=5e-4)
    assert log_linear(1).tolist() == pytest.approx([80])
    assert log_linear(4, 8.0, 1.0).log2().tolist() == pytest.approx([3, 2, 1, 0], abs=1e-12)


def test_sigma_and_abar_are_inverse() -> None:
    sigma = torch.logspace(-2, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(sigma_from_abar(abar_from_sigma(sigma)), sigma, rtol=1e-10, atol=0)
    abar = linear_abar().double()
    torch.testing.assert_close(abar_from_sigma(sigma_from_abar(abar)), abar, rtol=1e-12, atol=0)
    assert sigma_from_abar(abar)[[0, -1]].tolist() == pytest.approx([0.0100005, 157.41], rel=1e-4)


def test_index_range() -> None:
    assert index_range(1000, 0.02, 0.98) == (20, 980)
    assert index_range(1000, 0, 1) == (0, 999)
    assert index_range(10, 1, 1) == (9, 9)
    assert 0.29 * 100 < 29  # an index is not lost to that rounding
    assert index_range(100, 0.29, 0.57) == (29, 57)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: karras(0), "n must be a whole number"),
        (lambda: karras(10, rho=0), "rho must be above 0"),
        (lambda: karras(10, 1.0, 0.5), "got 1.0 and 0.5"),
        (lambda: karras(10, 0.0, 0.5), "sigma_min must be above 0 .*got 0.0"),
        (lambda: log_linear(0), "n must be .*got 0"),
        (lambda: log_linear(3, 0.1, 0.5), "got 0.5 and 0.1"),
        (lambda: index_range(10, 0.5, 0.2), r"\[0.5, 0.2\]"),
        (lambda: index_range(10, -0.1, 0.2), r"\[-0.1, 0.2\]"),
        (lambda: index_range(10, 0.1, 1.2), r"\[0.1, 1.2\]"),
    ],
)
def test_errors(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()

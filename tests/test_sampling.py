"""Samplers: which steps carry gradient, that an image depends on its seed alone, and exact ODE solutions."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest
import torch
from torch import Tensor, nn

from unidad_pl.condition import Condition
from unidad_pl.denoiser import Denoiser, Prediction
from unidad_pl.sampling import (
    FewStepSampler,
    GradientMode,
    Noise,
    ddim,
    heun,
    random_noise,
    sampling_sigmas,
    seeded_noise,
)
from unidad_pl.schedules import log_linear

SHAPE = (2, 4, 4)


class Gaussian(Denoiser):
    """The exact denoiser of N(mean, std^2), and where its probability-flow ODE ends."""

    image_shape = SHAPE

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        s = sigma.view(-1, 1, 1, 1)
        x0 = (self.std**2 * x + s**2 * self.mean) / (self.std**2 + s**2)
        return Prediction(x0, (x - x0) / s)

    def end(self, x: Tensor, sigma: float) -> Tensor:
        return self.mean + (x - self.mean) * self.std / math.sqrt(self.std**2 + sigma**2)

    def taps(
        self, x: Tensor, sigma: Tensor, cond: Condition | None = None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    @property
    def tap_channels(self) -> dict[str, int]:
        return {}


class Stepwise(Gaussian):
    """One weight per application, so that the gradient shows which applications were differentiated."""

    def __init__(self, steps: int) -> None:
        super().__init__(0.0, 0.5)
        self.weights = nn.Parameter(torch.ones(steps))
        self.seen: list[tuple[Tensor, float]] = []

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        assert (sigma == sigma[0]).all()
        assert sigma.shape == (len(x),)
        weight = self.weights[len(self.seen)]
        self.seen.append((x.detach(), float(sigma[0])))
        return super().predict(weight * x, sigma)


def fixed_noise(batch: int = 3) -> Noise:
    return seeded_noise(range(batch), SHAPE, "cpu")


@pytest.mark.parametrize(
    ("gradient", "stop", "reached", "applications"),
    [
        ("unroll", None, [True, True, True], 3),
        ("last", None, [False, False, True], 3),
        ("backward_simulation", None, [False, False, True], 3),
        ("backward_simulation", 1, [False, True, False], 2),
        ("backward_simulation", 0, [True, False, False], 1),
    ],
)
def test_gradient_modes(gradient: GradientMode, stop: int | None, reached: list[bool], applications: int) -> None:
    student = Stepwise(3)
    FewStepSampler(log_linear(3), gradient)(student, fixed_noise(), stop=stop).pow(2).sum().backward()
    assert student.weights.grad is not None
    assert (student.weights.grad != 0).tolist() == reached
    assert len(student.seen) == applications


def test_no_graph_under_no_grad() -> None:
    with torch.no_grad():
        assert not FewStepSampler(log_linear(3))(Stepwise(3), fixed_noise()).requires_grad


def test_inputs_are_renoised_outputs() -> None:
    student, draws = Stepwise(3), fixed_noise()
    z, eps1, eps2 = draws(), draws(), draws()
    sigmas = log_linear(3, 80.0, 0.5)
    x = FewStepSampler(sigmas)(student, fixed_noise())
    exact = Gaussian(0.0, 0.5)
    x0 = exact(80.0 * z, sigmas[:1].expand(3).float())
    second = x0 + float(sigmas[1]) * eps1
    third = exact(second, sigmas[1:2].expand(3).float()) + 0.5 * eps2
    assert [sigma for _, sigma in student.seen] == pytest.approx(sigmas.tolist())
    torch.testing.assert_close(student.seen[1][0], second)
    torch.testing.assert_close(student.seen[2][0], third)
    torch.testing.assert_close(x, exact(third, torch.full((3,), 0.5)))


def test_sample_17_is_the_same_in_any_batch() -> None:
    def images(seeds: list[int]) -> Tensor:
        return FewStepSampler(log_linear(3))(Gaussian(0.1, 0.5), seeded_noise(seeds, SHAPE, "cpu"))

    (alone,) = images([17])
    assert torch.equal(alone, images([3, 17, 5])[1])
    assert torch.equal(alone, images(list(range(16, 24)))[1])
    assert not torch.equal(alone, images([18])[0])


def test_noise_draws() -> None:
    noise = seeded_noise(torch.tensor([4, 4]), SHAPE, "cpu")
    first, second = noise(), noise()
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert random_noise(5, SHAPE, "cpu")().shape == (5, *SHAPE)


@pytest.mark.parametrize(
    ("sigmas", "gradient", "message"),
    [
        ([0.5, 80.0], "unroll", r"descend, got \[0.5, 80.0\]"),
        ([80.0, 80.0], "unroll", "descend"),
        ([1.0, 0.0], "unroll", "positive"),
        ([], "unroll", "positive"),
        ([[2.0, 1.0]], "unroll", "positive"),
        ([80.0], "first", "'first'"),
    ],
)
def test_errors(sigmas: list[float], gradient: GradientMode, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewStepSampler(torch.tensor(sigmas), gradient)


def error_of(sampler, steps: int) -> float:  # type: ignore[no-untyped-def]
    """Largest distance of a sampler's images from the exact end of the ODE."""
    exact, draw = Gaussian(0.3, 0.5), fixed_noise()().double()
    images = sampler(exact, lambda: draw, sampling_sigmas(steps, rho=3.0).double())
    return float((images - exact.end(80.0 * draw, 80.0)).abs().max())


def test_heun_solves_the_ode_with_second_order() -> None:
    errors = [error_of(heun, steps) for steps in (40, 80, 160)]
    assert errors[2] < 2e-3
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3


def test_ddim_solves_the_ode_with_first_order() -> None:
    errors = [error_of(ddim, steps) for steps in (40, 80, 160)]
    assert errors[2] < 5e-2
    assert 1.7 < errors[0] / errors[1] < 2.5
    assert 1.7 < errors[1] / errors[2] < 2.5


def test_one_step_is_exact_for_a_single_image() -> None:
    point = Gaussian(0.3, 0.0)
    for sampler in (heun, ddim):
        images = sampler(point, fixed_noise(), sampling_sigmas(1))
        torch.testing.assert_close(images, torch.full((3, *SHAPE), 0.3), rtol=0, atol=1e-4)  # float32 at sigma 80


def test_sampling_sigmas() -> None:
    sigmas = sampling_sigmas(25)
    assert len(sigmas) == 26
    assert sigmas[[0, -2, -1]].tolist() == pytest.approx([80, 0.002, 0], rel=1e-5)
    assert (sigmas.diff() < 0).all()

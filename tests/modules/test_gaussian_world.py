"""Uni-DAD where every network is known exactly: data N(mu, 1), one affine step for a student."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.worlds import AffineStudent, Gaussian, Stream, fit, unidad
from unidad_pl import OptimizerOptions, UniDAD
from unidad_pl.schedules import karras

SOURCE, TARGET = -2.0, 2.0
# F must follow G closely, or the pair circles around the fixed point.
STEADY = OptimizerOptions(lr=0.02, warmup=0, decay_to=0.02, arguments={"betas": (0.0, 0.95), "weight_decay": 0.0})
QUICK = OptimizerOptions(lr=0.1, warmup=0, decay_to=0.02, arguments={"betas": (0.5, 0.9), "weight_decay": 0.0})
EXACT: dict[str, Any] = dict(
    student__num_steps=1, student__update_every=1, student__optimizer=STEADY, fake_score__optimizer=QUICK,
    target_teacher__adaptation__optimizer=QUICK, gan=None, denoising__sigma_data=1.0, training__ema_decay=0.0,
)  # fmt: skip


def train(iterations: int, **options: Any) -> UniDAD:
    target = dict(target_teacher__init_from=Gaussian(TARGET), target_teacher__adaptation=None)
    module = unidad(Gaussian(SOURCE), student__init_from=Gaussian(0.5, AffineStudent), **target, **(EXACT | options))
    fit(module, iterations, Stream(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), batch_size=32))
    return module


def mean_absolute_error(m: float, mu: float, sigma: Tensor) -> Tensor:
    """E|x - D(x + sigma eps)| for x ~ N(m, 1): the mean of a folded normal."""
    a = sigma**2 / (1 + sigma**2) * (m - mu)
    s = sigma / (1 + sigma**2).sqrt()
    return s * math.sqrt(2 / math.pi) * (-(a**2) / (2 * s**2)).exp() + a * torch.erf(a / (s * math.sqrt(2)))


def fixed_point(w_source: float, w_target: float, sigma: Tensor) -> float:
    """The student mean where the two teachers' normalised directions cancel, by bisection."""

    def pull(m: float) -> float:
        gain = sigma**2 / (1 + sigma**2)
        toward = [w * gain * (m - mu) / mean_absolute_error(m, mu, sigma) for w, mu in
                  ((w_source, SOURCE), (w_target, TARGET))]  # fmt: skip
        return float((toward[0] + toward[1]).mean())

    low, high = SOURCE, TARGET
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if pull(middle) > 0 else (middle, high)
    return (low + high) / 2


def test_the_source_alone_is_reached() -> None:
    """The target alone is: see the world of texts."""
    straight = replace(STEADY, lr=0.04)  # there is nothing to circle around
    module = train(200, student__optimizer=straight, target_teacher=None)
    assert float(module.student.mu) == pytest.approx(SOURCE, abs=0.05)
    assert float(module.fake_score.mu) == pytest.approx(SOURCE, abs=0.1)
    assert not hasattr(module, "target_teacher")
    assert hasattr(module, "source_teacher")


@pytest.mark.slow
def test_between_two_teachers_the_student_settles_at_the_closed_form_point() -> None:
    weights = (1.2, 1.0)  # of sum 1: in the world of texts
    module = train(350, matching__source_weight=weights[0], target_teacher__weight=weights[1])
    table = karras().double()[20:981]
    assert float(module.student.mu) == pytest.approx(fixed_point(*weights, table), abs=0.05)


def test_the_closed_form_point_moves_with_the_weights() -> None:
    table = karras().double()[20:981]
    points = [fixed_point(1 - a, a, table) for a in (0.4, 0.45, 0.5, 0.55)]
    assert points == sorted(points)
    assert points[2] == pytest.approx(0, abs=1e-6)
    assert points[1] < -0.2

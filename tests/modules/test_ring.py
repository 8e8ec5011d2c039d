"""What each term is good for, on a ring of eight modes with ten shots elsewhere: the order of the paper's ablation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ring import SOURCE, TARGET, Points, found, points, source
from tests.worlds import Stream, fit, groups
from unidad_pl import AdaptationOptions, Diffusion, OptimizerOptions, UniDAD

pytestmark = pytest.mark.slow


def rate(lr: float) -> OptimizerOptions:
    return OptimizerOptions(lr=lr, warmup=20, decay_to=0.02)


T = AdaptationOptions(update="every", optimizer=rate(3e-3))
FIRST = AdaptationOptions(update="every", optimizer=rate(3e-3), pretrain=300, until=300)
METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "source only": (150, dict(target_teacher=None)),
    "GAN only": (200, dict(target_teacher=None, matching=None)),
    "all networks at once": (300, dict(target_teacher__weight=0.75, target_teacher__adaptation=T)),
    "T first": (600, dict(target_teacher__weight=0.95, target_teacher__adaptation=FIRST)),
}
"""Method -> iterations and options."""


@pytest.fixture(scope="module")
def network() -> Points:
    return source()


@pytest.fixture(scope="module")
def samples(network: Points) -> dict[str, Tensor]:
    """1000 samples of each method's student."""
    shots = ((points(10, TARGET, seed=5) + 1) * 127.5).round().to(torch.uint8)
    drawn = {}
    for name, (steps, options) in METHODS.items():
        torch.manual_seed(0)
        module = UniDAD(network, **groups(
            student__num_steps=3, student__sigma_max=5.0, student__sigma_min=0.1, student__update_every=2,
            student__optimizer=rate(2e-3), fake_score__optimizer=rate(4e-3), matching__range=(0.05, 0.8),
            gan__student_weight=0.02, gan__critic_weight=0.05, training__ema_decay=0.98, **options,
        ))  # fmt: skip
        fit(module, steps, Stream(shots, batch_size=64))
        drawn[name] = module.sample(seeds=range(1000))
    return drawn


def test_the_source_knows_its_ring(network: Points) -> None:
    module = Diffusion(network)
    module.configure_model()
    drawn, near = found(module.sample(seeds=range(1000)), SOURCE)
    assert drawn == 8
    assert near > 0.85


def test_the_source_teacher_alone_stays_where_it_is(samples: dict[str, Tensor]) -> None:
    assert found(samples["source only"], SOURCE)[0] == 8
    assert found(samples["source only"], TARGET)[1] < 0.06


def test_the_discriminator_alone_finds_the_place_and_fewer_modes(samples: dict[str, Tensor]) -> None:
    assert found(samples["GAN only"], SOURCE)[0] <= 3
    assert found(samples["GAN only"], TARGET)[1] > 0.1
    assert found(samples["GAN only"], TARGET)[0] < found(samples["T first"], TARGET)[0]


def test_with_the_target_teacher_it_is_the_target(samples: dict[str, Tensor]) -> None:
    assert found(samples["source only"], TARGET)[1] < 0.5 * found(samples["all networks at once"], TARGET)[1]
    modes, near = found(samples["T first"], TARGET)
    assert modes >= 5  # of seven in the shots
    assert near > 0.25

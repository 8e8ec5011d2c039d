"""The choice of cartoon shots: as varied as their domain."""

from __future__ import annotations

import pytest
import torch

from tests.metrics.toys import refused
from unidad_pl.cartoons import world
from unidad_pl.cartoons.shots import MOST_SEED, choose_shots
from unidad_pl.data import FewShotDataModule
from unidad_pl.denoiser import to_uint8


@pytest.mark.parametrize("domain", world.DOMAINS)
@pytest.mark.parametrize("seed", [0, 5])
def test_ten_shots_show_the_whole_domain(domain: str, seed: int) -> None:
    chosen = choose_shots(domain, 10, seed)
    assert len(set(chosen)) == 10
    assert chosen[0] == (seed + 1) * 1_000_000
    labels, everyone = world.factors(chosen, domain), world.factors(range(5000), domain)
    seen = world.visible(labels)
    for name, values in world.CATEGORIES.items():
        if seen[name].all():
            share = torch.bincount(labels[name], minlength=len(values)) / 10
            truth = torch.bincount(everyone[name], minlength=len(values)) / 5000
            # No ten images can match better than a tenth for each value; ten at random are .25 off on average.
            assert (share - truth).abs().max() <= 0.2, name
    for name in world.RANGES:
        if seen[name].all():
            off = (labels[name].mean() - everyone[name].mean()).abs() / everyone[name].std()
            assert off < 0.25, name  # of ten at random it is .25 on average


def test_shots_of_a_seed_are_a_prefix_of_more_and_reach_the_data_module() -> None:
    assert choose_shots("cats", 4, 3) == choose_shots("cats", 10, 3)[:4]
    assert set(choose_shots("cats", 10, 3)).isdisjoint(choose_shots("cats", 10, 4))
    data = FewShotDataModule("builtin:cats", shots=4, seed=3, resolution=16)
    assert torch.equal(to_uint8(data.shots), to_uint8(world.render(choose_shots("cats", 4, 3), "cats", 16)))
    assert data.shot_names == [f"cats[{i}]" for i in choose_shots("cats", 4, 3)]


def test_many_shots_and_wrong_requests() -> None:
    assert len(set(choose_shots("faces", 500, 0))) == 500
    assert choose_shots("faces", 100_000, 1) == list(range(2_000_000, 2_100_000))
    for count in (0, 1_000_001, 10**12):
        refused(rf"shots must be .* \[1, 1000000\], got {count}", choose_shots, "faces", count, 0)
    for seed in (-1, MOST_SEED + 1, 2**63 - 1):
        refused(rf"seed must be .*, got {seed}", choose_shots, "faces", 1, seed)
    assert choose_shots("faces", 1, MOST_SEED) == [(MOST_SEED + 1) * 1_000_000]
    for count in (1, 1000):
        refused("unknown cartoon domain 'dogs'", choose_shots, "dogs", count, 0)

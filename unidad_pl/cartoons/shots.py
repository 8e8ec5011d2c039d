"""Which cartoons serve as the few shots: a set that is as varied as its domain.

Somebody who picks ten pictures for a new domain takes ten that differ. Ten consecutive renders do not: four of them may
have the darkest skin and none a beard, and a generator that learnt them well would still be far from its domain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unidad_pl.cartoons import world
from unidad_pl.checks import check_whole

SHOTS_START = 1_000_000  # the candidates of seed s begin at (s + 1) million; the reference set at 0
CANDIDATES = 1000
MOST_CHOSEN = 500  # more are as varied as their domain by themselves
MOST_SEED = 2**63 // SHOTS_START - 2  # indices of images have 63 bits


def factor_vectors(labels: dict[str, Tensor]) -> Tensor:
    """The visible factors of N cartoons as centred vectors [N, D]: one-hot categories, standardised numbers."""
    seen = world.visible(labels)
    categories = [(name, len(values)) for name, values in world.CATEGORIES.items() if seen[name].any()]
    columns = [torch.nn.functional.one_hot(labels[name], count).float() for name, count in categories]
    columns += [(labels[name] / labels[name].std() / 2).unsqueeze(1) for name in world.RANGES if seen[name].any()]
    vectors = torch.cat(columns, 1)
    return vectors - vectors.mean(0)


def choose_shots(domain: str, count: int, seed: int) -> list[int]:
    """``count`` image indices of ``domain`` whose factors are spread as in the whole domain.

    Kernel herding (Welling, 2009) with a linear kernel: each next image is the candidate that brings the mean factor
    vector of the chosen ones nearest to that of all candidates. The first candidate of the seed always comes first.

    Args:
        domain: one of :data:`~unidad_pl.cartoons.world.DOMAINS`.
        count: 1 to a million; more than :data:`MOST_CHOSEN` are not chosen: they are the first of the seed's million.
        seed: of the thousand candidates, 0 to :data:`MOST_SEED`.

    Returns:
        Distinct indices, in the order of choice: fewer shots of a seed are the first of more that are chosen.

    Raises:
        ValueError: an unknown domain, or a count or a seed out of range.
    """
    check_whole(1, SHOTS_START, shots=count)
    check_whole(0, MOST_SEED, seed=seed)
    start = SHOTS_START * (seed + 1)
    candidates = range(start, start + CANDIDATES)
    vectors = factor_vectors(world.factors(candidates, domain))
    if count > MOST_CHOSEN:
        return list(range(start, start + count))
    chosen, total = [0], vectors[0].clone()
    while len(chosen) < count:
        distance = (total + vectors).square().sum(1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total += vectors[chosen[-1]]
    return [candidates[i] for i in chosen]

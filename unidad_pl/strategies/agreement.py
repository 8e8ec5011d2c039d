"""Ranks that would train on other data, or with other options, are told apart before the first iteration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from unidad_pl.arguments import differences


def check_agreement(facts: Iterable[tuple[str, Any]]) -> None:
    """Compare ``facts`` (name, plain value) over all ranks; on a single process nothing happens.

    Raises:
        RuntimeError: on every rank: names what differs, the rank, and both values.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    of_ranks: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, dict(facts) | {"torch": torch.__version__})
    for rank, own in enumerate(of_ranks):
        for name, (first, other) in differences(of_ranks[0], own).items():
            raise RuntimeError(
                f"the ranks do not agree: {name} is {first!r} on rank 0 and {other!r} on rank {rank}. Give every rank "
                f"the same config, and a folder with the same files"
            )

"""Rows of data gathered over ranks: what makes a metric the same number on one process and on many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric


def cat_rows(parts: Sequence[Tensor] | Tensor) -> Tensor:
    """Tensors [n_i, ...] end to end; parts without rows are dropped, whatever their other sizes."""
    if isinstance(parts, Tensor):
        return parts
    filled = [part for part in parts if len(part)]
    return torch.cat(filled) if filled else parts[0]


def double(x: Tensor) -> Tensor:
    """``x`` in float64; on the CPU if its device has none (mps)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


class RowMetric(Metric):
    """A metric whose states are rows, one per sample, gathered from all ranks when it is computed.

    torchmetrics gathers lists of tensors too, but a process that saw no sample then contributes a tensor of the wrong
    shape and type; here it contributes zero rows.
    """

    full_state_update = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._specs: dict[str, tuple[int, torch.dtype]] = {}

    def add_rows(self, name: str, ndim: int, dtype: torch.dtype) -> None:
        """Register a state: rows [n, ...] with ``ndim`` dimensions in all."""
        self.add_state(name, default=[], dist_reduce_fx=cat_rows)
        self._specs[name] = (ndim, dtype)

    def append(self, name: str, rows: Tensor) -> None:
        """Add rows to a state."""
        getattr(self, name).append(rows.detach().to(self.device, self._specs[name][1]))

    def count(self, name: str) -> int:
        """How many rows a state has."""
        state = getattr(self, name)
        return len(state) if isinstance(state, Tensor) else sum(map(len, state))

    def rows(self, name: str) -> Tensor:
        """All rows of a state: this rank's, or everyone's inside ``compute``."""
        state = getattr(self, name)
        if isinstance(state, list) and not state:
            ndim, dtype = self._specs[name]
            return torch.zeros(*[0] * ndim, dtype=dtype, device=self.device)
        return cat_rows(state)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Make every state exactly one tensor of its type, as ranks must gather the same number; then synchronise."""
        for name in self._specs:
            if isinstance(getattr(self, name), list):
                setattr(self, name, [self.rows(name)])
        super().sync(*args, **kwargs)


def sample_indices(images: int, indices: Tensor | Sequence[int] | None, start: int) -> Tensor:
    """Global sample numbers [images] int64: the given ones, checked, or the next ones after ``start`` own samples.

    The default deals numbers to ranks in turn, so that they are unique: ``rank, rank + world, rank + 2 world, ...``.

    Raises:
        ValueError: another number of indices than of images.
    """
    if indices is None:
        spread = dist.is_available() and dist.is_initialized()
        world, rank = (dist.get_world_size(), dist.get_rank()) if spread else (1, 0)
        return torch.arange(start, start + images) * world + rank
    indices = torch.as_tensor(indices, dtype=torch.long).flatten()
    if len(indices) != images:
        raise ValueError(f"{len(indices)} indices for {images} images: give one index per image")
    return indices


def distinct_in_order(index: Tensor) -> Tensor:
    """Positions of the distinct values of ``index`` [n], ascending by value.

    A repeated number is the same sample seen twice (samplers pad the ranks' shares to equal length): it counts once.
    """
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return order[new]

"""Rows of data gathered over ranks: what makes a metric the same number on one process and on many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

DEALT = 1 << 62
"""Added to the numbers of samples whose caller gave none, so that they are never taken for numbers that were given."""


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
    shape and type; here it contributes zero rows. A subclass that has several values computes a dict of them; one of
    them is a metric too: ``PRDC()["precision"]``.
    """

    is_differentiable = False
    full_state_update = True  # the numbers of samples follow from those before

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._specs: dict[str, tuple[int, torch.dtype]] = {}
        self._numbered: dict[str, str] = {}
        self._on_cpu: set[str] = set()

    def add_rows(
        self, name: str, ndim: int, dtype: torch.dtype, numbers: str | None = None, on_cpu: bool = False
    ) -> None:
        """Register a state: rows [n, ...] with ``ndim`` dimensions in all.

        Args:
            name: of the state.
            ndim: dimensions of its rows together.
            dtype: of its values.
            numbers: if the rows are samples' numbers: the state with a row for each sample; often the same.
            on_cpu: its rows are kept there, being large, or in float64 that not every device has.
        """
        self.add_state(name, default=[], dist_reduce_fx=cat_rows)
        self._specs[name] = (ndim, dtype)
        if numbers is not None:
            self._numbered[name] = numbers
        if on_cpu:
            self._on_cpu.add(name)

    def _apply(self, fn: Any, exclude_state: Sequence[str] = ()) -> Any:
        @wraps(fn)  # torchmetrics goes by its name
        def moved(rows: Tensor) -> Tensor:  # numbers must stay whole whatever type values are converted to
            found: Tensor = fn(rows)
            return found if rows.is_floating_point() else rows.to(found.device)

        return super()._apply(moved, [*exclude_state, *self._on_cpu])

    def append(self, name: str, rows: Tensor) -> None:
        """Add rows to a state."""
        getattr(self, name).append(rows.detach().to(self._home(name), self._specs[name][1]))

    def _home(self, name: str) -> torch.device:
        return torch.device("cpu") if name in self._on_cpu else self.device

    def count(self, name: str) -> int:
        """How many rows a state has."""
        return sum(map(len, getattr(self, name)))

    def rows(self, name: str) -> Tensor:
        """All rows of a state: this rank's, or everyone's inside ``compute``."""
        state = getattr(self, name)
        if not state:
            ndim, dtype = self._specs[name]
            return torch.zeros(*[0] * ndim, dtype=dtype, device=self._home(name))
        return cat_rows(state)

    def number(self, name: str, count: int, indices: Tensor | Sequence[int] | None) -> Tensor:
        """Numbers [count] int64 of new samples, for state ``name``: the given ones, or the next that are free.

        Raises:
            ValueError: another number of indices than of samples, or indices in one update and none in another.
        """
        numbers = sample_indices(count, indices, start=self.count(name))
        numbers = numbers + DEALT if indices is None else numbers
        self._check_alike(name, [numbers] if count else [])
        return numbers

    def _check_alike(self, name: str, numbers: Sequence[Tensor]) -> None:
        kinds = {bool(part[0] >= DEALT) for part in (*getattr(self, name), *numbers) if len(part)}
        if len(kinds) > 1:
            raise ValueError(
                f"{type(self).__name__}: some samples came with indices and some without, so that one could be taken "
                f"for another: give indices in every update or in none"
            )

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot ``val``, by default the value now; see ``torchmetrics``, which needs matplotlib for it."""
        return self._plot(val, ax)

    def scalar(self, value: float) -> Tensor:
        """``value`` as a tensor on this metric's device, in float64 where that has it."""
        return torch.tensor(
            value, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device
        )

    @contextmanager
    def everyones(self) -> Iterator[None]:
        """In this block states hold the rows of all ranks, as they do in ``compute``; all ranks must enter it."""
        already = self._is_synced
        with self.sync_context(self.dist_sync_fn, should_sync=self._to_sync and not already, should_unsync=not already):
            yield

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        for name in self._specs:
            self._before_gathering(name)
            everyone = dist_sync_fn(self.rows(name).to(self.device), group=process_group or self.process_group)
            setattr(self, name, [cat_rows(everyone).to(self._home(name))])

    def _before_gathering(self, name: str) -> None:
        """Drop what need not be sent of a state; those registered before it are everyone's already."""

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another metric of this class, or of its ``metric_state``.

        Samples with given numbers keep them (an equal number is the same sample), others are numbered on.

        Raises:
            ValueError: a metric of another class, a state that is missing, or given numbers on one side only.
        """
        if isinstance(incoming_state, Metric) and type(incoming_state) is not type(self):
            raise ValueError(f"{type(self).__name__} cannot take in the state of a {type(incoming_state).__name__}")
        states = incoming_state.metric_state if isinstance(incoming_state, Metric) else incoming_state
        if absent := [name for name in self._specs if name not in states]:
            raise ValueError(f"{type(self).__name__} cannot take in a state without {', '.join(absent)}")
        listed: dict[str, Any] = {name: [rows] if isinstance(rows, Tensor) else rows for name, rows in states.items()}
        parts: dict[str, list[Tensor]] = {name: list(listed[name]) for name in self._specs}
        for name, counted in self._numbered.items():
            self._check_alike(name, [part for part in parts[name] if len(part)])
            shift = self.count(counted) * _place()[0]
            parts[name] = [torch.where(part >= DEALT, part + shift, part) for part in parts[name]]
        for name, incoming in parts.items():
            setattr(self, name, [*getattr(self, name), *(part.to(self._home(name)) for part in incoming)])
        self._computed = None
        self._update_count += incoming_state.update_count if isinstance(incoming_state, Metric) else 1


def _place() -> tuple[int, int]:
    """(world size, rank) of this process."""
    spread = dist.is_available() and dist.is_initialized()
    return (dist.get_world_size(), dist.get_rank()) if spread else (1, 0)


def sample_indices(images: int, indices: Tensor | Sequence[int] | None, start: int) -> Tensor:
    """Global sample numbers [images] int64: the given ones, checked, or the next ones after ``start`` own samples.

    The default deals numbers to ranks in turn, so that they are unique: ``rank, rank + world, rank + 2 world, ...``.

    Raises:
        ValueError: another number of indices than of images, or one that is no number of 62 bits.
    """
    if indices is None:
        world, rank = _place()
        return torch.arange(start, start + images) * world + rank
    try:
        indices = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"indices must be whole numbers, got {indices!r:.80}") from None
    if indices.numel() and (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool):
        raise ValueError(f"indices must be whole numbers, got {indices.dtype}")
    indices = indices.to(torch.long).flatten()
    if len(indices) != images:
        raise ValueError(f"{len(indices)} indices for {images} images: give one index per image")
    if images and int(indices.max()) >= DEALT:
        raise ValueError(f"indices must be below {DEALT}, got {int(indices.max())}")
    if images and int(indices.min()) < 0:
        raise ValueError(f"indices must be at least 0, got {int(indices.min())}")
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


class NumberedRows(RowMetric):
    """What was read from each sample, over all ranks, in the order of the samples' numbers; a number counts once.

        >>> rows = NumberedRows(torch.float32)
        >>> rows.update(torch.tensor([[5.0, 1.0], [3.0, 2.0]]), index=torch.tensor([1, 0]))
        >>> rows.compute()
        tensor([[3., 2.],
                [5., 1.]])

    torchmetrics makes a scalar of a single number: reshape what may be one.

    Args:
        dtype: of the values.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.add_rows("index", 1, torch.long, numbers="index")
        self.add_rows("values", 2, dtype)

    def update(self, values: Tensor, index: Tensor) -> None:
        """``values`` [B, K] of the samples numbered ``index`` [B]."""
        self.append("values", values)
        self.append("index", index)

    def compute(self) -> Tensor:
        return self.rows("values")[distinct_in_order(self.rows("index"))]

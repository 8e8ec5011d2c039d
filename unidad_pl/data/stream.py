"""Endless training streams whose batches depend on their position alone: what resuming and ranks rest on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import count
from typing import Generic, TypeVar

from torch.utils.data import IterableDataset

T = TypeVar("T")


class PositionStream(IterableDataset[T], ABC, Generic[T]):
    """Endless batches; a subclass makes the batch at given positions, which must depend on nothing else.

    Args:
        batch_size: images per batch.
        start: returns the iterations already done; asked whenever an epoch begins.
        world: number of ranks; each takes its own share of every global batch.
        rank: this rank.
    """

    def __init__(self, batch_size: int, start: Callable[[], int] = lambda: 0, world: int = 1, rank: int = 0) -> None:
        self.batch_size, self.start, self.world, self.rank = batch_size, start, world, rank

    @abstractmethod
    def batch_at(self, positions: range) -> T:
        """The images at ``positions`` of the stream."""

    def __iter__(self) -> Iterator[T]:
        for iteration in count(self.start()):
            first = (iteration * self.world + self.rank) * self.batch_size
            yield self.batch_at(range(first, first + self.batch_size))

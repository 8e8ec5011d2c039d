"""What loaders draw from: endless training streams that depend on positions alone, and batches of sample seeds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from unidad_pl.data.batch import Batch
from unidad_pl.denoiser import to_float
from unidad_pl.seeds import mix_seed

T = TypeVar("T")


class PositionStream(IterableDataset[T], ABC):
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


def place_in(trainer: Any) -> tuple[Callable[[], int], int, int]:
    """``start``, ``world`` and ``rank`` of a :class:`PositionStream` in ``trainer``, or without one."""
    if trainer is None:
        return lambda: 0, 1, 0
    return lambda: trainer.global_step, trainer.world_size, trainer.global_rank


class SeedBatches(IterableDataset[dict[str, Tensor]]):
    """This rank's batches of seeds. Iterable, so that Lightning does not shard them a second time."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class ShotStream(PositionStream[Batch]):
    """Endless batches of a small image set; position p of the stream is a function of (seed, p) alone.

    Every epoch of N positions visits each image once, in an order of its own; flips and shifts are drawn per position.

    Args:
        images: [N, C, H, W] uint8.
        batch_size: images per batch.
        flip: mirror half of the positions.
        seed: of orders, flips and shifts.
        start, world, rank: see :class:`PositionStream`.
        shift: largest translation in pixels, along each axis.
        labels: [N] class numbers, which batches carry then.
    """

    def __init__(
        self, images: Tensor, batch_size: int, flip: bool, seed: int, start: Callable[[], int] = lambda: 0,
        world: int = 1, rank: int = 0, shift: int = 0, labels: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, start, world, rank)
        self.images, self.flip, self.seed, self.shift, self.labels = images, flip, seed, shift, labels
        self._orders: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def batch_at(self, positions: range) -> Batch:
        numbers, images = zip(*map(self._image_at, positions), strict=True)
        labels = None if self.labels is None else self.labels[list(numbers)]
        return Batch(to_float(torch.stack(images)), labels)

    def _image_at(self, position: int) -> tuple[int, Tensor]:
        epoch, place = divmod(position, len(self.images))
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, 2, epoch))
            order = torch.randperm(len(self.images), generator=generator)
            mirror = torch.rand(len(self.images), generator=generator) < (0.5 if self.flip else 0.0)
            moves = torch.randint(-self.shift, self.shift + 1, (len(self.images), 2), generator=generator)
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: (order, mirror, moves)}
        order, mirror, moves = self._orders[epoch]
        number = int(order[place])
        image = self.images[number].flip(-1) if mirror[place] else self.images[number]
        return number, translate(image, *moves[place].tolist())


def translate(image: Tensor, down: int, right: int) -> Tensor:
    """``image`` [C, H, W] moved by whole pixels; its edge is repeated where nothing is left."""
    rows = (torch.arange(image.shape[-2]) - down).clamp(0, image.shape[-2] - 1)
    columns = (torch.arange(image.shape[-1]) - right).clamp(0, image.shape[-1] - 1)
    return image[:, rows][:, :, columns]

"""Labelled cartoons of all domains: what the feature network of the cartoon metrics is trained on.

Index ranges of the cartoon world, so that nothing is judged by a network that was trained on it:

* ``0 ...``: reference sets of :class:`~unidad_pl.data.few_shot.FewShotDataModule`;
* ``(s + 1) * 1_000_000 ...``: candidates for its shots, for seed ``s``;
* ``2_500_000 ... 2_999_999``: held-out validation images here;
* ``3_500_000 ... 3_999_999``: training images here. Both start at half a million, clear of the shots of any seed as
  long as there are fewer than 500 000 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unidad_pl.cartoons import world
from unidad_pl.checks import check_whole
from unidad_pl.data.image_sets import CartoonImages
from unidad_pl.data.stream import PositionStream, place_in
from unidad_pl.denoiser import to_float
from unidad_pl.seeds import MOST_SEED, mix_seed

VALIDATION_START = 2_500_000
TRAIN_START = 3_500_000
_SPAN = 500_000  # images in each of the two ranges
MOST_SIDE = 1024


@dataclass
class LabelledBatch:
    """Cartoons and what is in them.

    Attributes:
        images: [B, 3, R, R] float32 in [-1, 1].
        labels: factor -> [B], as :func:`~unidad_pl.cartoons.world.factors` gives them.
        domain: [B] int64, positions in :data:`~unidad_pl.cartoons.world.DOMAINS`.
    """

    images: Tensor
    labels: dict[str, Tensor]
    domain: Tensor


class CartoonDataModule(pl.LightningDataModule):
    """Labelled renders: an endless training stream over a pool held in memory, and a held-out set per domain.

    The training image at position ``p`` of the run is a function of ``(seed, p)`` alone, so a resumed run continues
    where it was. Every validation batch is of one domain.

    Args:
        domains: which domains, in turn: image ``i`` of the pool is of domain ``i mod len(domains)``.
        pool_size: training images, rendered once and kept as uint8.
        val_size: held-out images of each domain.
        batch_size: images per training step and rank.
        eval_batch_size: images per validation batch.
        resolution: image side in pixels.
        seed: of the order of the training images.

    Raises:
        ValueError: an unknown domain or none, or a size outside of its index range.
    """

    def __init__(
        self,
        domains: Sequence[str] = world.FLAT,
        pool_size: int = 60_000,
        val_size: int = 1000,
        batch_size: int = 128,
        eval_batch_size: int = 250,
        resolution: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not domains:
            raise ValueError(f"domains must name at least one of {', '.join(world.DOMAINS)}, got none")
        for domain in domains:
            world.check_domain(domain)
        check_whole(1, _SPAN, pool_size=pool_size, val_size=val_size)
        check_whole(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_whole(1, MOST_SIDE, resolution=resolution)
        check_whole(0, MOST_SEED, seed=seed)
        self.domains, self.pool_size, self.val_size = tuple(domains), pool_size, val_size
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.resolution, self.seed = resolution, seed
        self._pool: LabelledBatch | None = None

    def setup(self, stage: str | None = None) -> None:
        """Render the training pool once, into memory; nothing at validation alone."""
        if self._pool is None and stage == "fit":
            indices = range(TRAIN_START, TRAIN_START + self.pool_size)
            parts = [
                draw(indices[start :: len(self.domains)], domain, self.resolution)
                for start, domain in enumerate(self.domains[: self.pool_size])
            ]
            labels = {name: torch.cat([part.labels[name] for part in parts]) for name in parts[0].labels}
            images, domains = (torch.cat([getattr(p, name) for p in parts]) for name in ("images", "domain"))
            self._pool = LabelledBatch(images, labels, domains)

    def train_dataloader(self) -> DataLoader[LabelledBatch]:
        self.setup("fit")
        assert self._pool is not None
        stream = LabelledStream(self._pool, self.batch_size, self.seed, *place_in(self.trainer))
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader[LabelledBatch]:
        held_out = range(VALIDATION_START, VALIDATION_START + self.val_size)
        batches = [
            _as_float(draw(held_out[i : i + self.eval_batch_size], domain, self.resolution))
            for domain in self.domains
            for i in range(0, self.val_size, self.eval_batch_size)
        ]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class LabelledStream(PositionStream[LabelledBatch]):
    """Endless batches; the image at position p is drawn from the pool, with replacement, by (seed, p) alone.

    Args:
        pool: labelled images, [N, 3, R, R] uint8.
        batch_size: images per batch.
        seed: of the draws.
        start, world, rank: see :class:`~unidad_pl.data.stream.PositionStream`.
    """

    def __init__(
        self, pool: LabelledBatch, batch_size: int, seed: int, start: Callable[[], int], world: int, rank: int
    ) -> None:
        super().__init__(batch_size, start, world, rank)
        self.pool, self.seed = pool, seed

    def batch_at(self, positions: range) -> LabelledBatch:
        rows = torch.tensor([mix_seed(self.seed, 3, position) % len(self.pool.images) for position in positions])
        labels = {name: values[rows] for name, values in self.pool.labels.items()}
        return _as_float(LabelledBatch(self.pool.images[rows], labels, self.pool.domain[rows]))


def draw(indices: range, domain: str, resolution: int = 32) -> LabelledBatch:
    """The cartoons ``indices`` of ``domain`` and their labels, images as uint8."""
    images = CartoonImages(domain, indices).load(resolution)
    number = torch.full((len(indices),), world.DOMAINS.index(domain))
    return LabelledBatch(images, world.factors(indices, domain), number)


def _as_float(batch: LabelledBatch) -> LabelledBatch:
    return LabelledBatch(to_float(batch.images), batch.labels, batch.domain)

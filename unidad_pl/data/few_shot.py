"""The few-shot DataModule: k real images in, endless training batches and evaluation seeds out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from unidad_pl.data import cartoons
from unidad_pl.data.batch import Batch, to_float, to_uint8
from unidad_pl.data.cartoon_shots import choose_shots
from unidad_pl.data.image_sets import ImageSet, open_images
from unidad_pl.data.images import image_hash
from unidad_pl.data.stream import PositionStream
from unidad_pl.seeds import mix_seed


class FewShotDataModule(pl.LightningDataModule):
    """A few target images for training, seeds for evaluation, a reference set for metrics.

    Training batches are endless and stateless: the image at position ``p`` of the run is a function of ``(seed, p)``,
    so a resumed run continues where it was and any number of workers or ranks sees the same stream. Validation, test
    and prediction loaders yield sample seeds, each exactly once over all ranks; the module turns them into images.

    Args:
        root: where the images are: a folder (with all folders in it) or a zip of PNG, JPEG, WebP or BMP files, an LMDB
            of the released code, a dataset saved to disk, or ``hf:NAME[:SPLIT]``, one of the Hugging Face hub. Give
            this or ``domain``.
        domain: ``faces``, ``sunglasses`` or ``cats`` of the embedded cartoon world, instead of a folder.
        shots: number of training images. A ``root`` with more gives a random choice by ``seed``, null takes all of it;
            a domain gives renders that are as varied as the domain (:func:`~.cartoon_shots.choose_shots`).
        resolution: image side in pixels; must be the model's.
        batch_size: images per iteration and rank.
        flip: mirror images at random, left to right.
        shift: move images by up to this many whole pixels at random, edges repeated. One or two keep networks from
            knowing a handful of small shots by heart; 0 as in the paper.
        seed: of the choice of shots, their order and flips; null: 0, or the command line's ``seed_everything``.
        labels: batches carry the class labels that come with the images (LMDB, Hugging Face), for a class-conditional
            model.
        reference: images that metrics compare with, any place ``root`` can name. Default: for a domain,
            ``reference_size`` held-out renders; for a root, its images that are not shots (all of it, if that leaves
            fewer than 2).
        exclude_shots: leave images that are equal to a shot, pixel for pixel at this resolution, out of the reference.
        reference_size: number of held-out renders of a domain.
        val_samples: seeds at validation.
        test_samples: seeds at test.
        predict_samples: seeds at prediction.
        eval_batch_size: seeds per evaluation batch.
        first_seed: the evaluation seeds are ``first_seed, first_seed + 1, ...``.
    """

    def __init__(
        self,
        root: str | None = None,
        domain: str | None = None,
        shots: int | None = 10,
        resolution: int = 32,
        batch_size: int = 1,
        flip: bool = True,
        shift: int = 0,
        seed: int | None = None,
        labels: bool = False,
        reference: str | None = None,
        exclude_shots: bool = True,
        reference_size: int = 1000,
        val_samples: int = 500,
        test_samples: int = 1000,
        predict_samples: int = 64,
        eval_batch_size: int = 50,
        first_seed: int = 0,
    ) -> None:
        super().__init__()
        if (root is None) == (domain is None):
            raise ValueError(f"give exactly one of root and domain, got root={root!r}, domain={domain!r}")
        if domain is not None:
            cartoons.check_domain(domain)
        if domain is not None and labels:
            raise ValueError("labels=True needs a root whose images have class labels, a cartoon domain has none")
        if domain is not None and shots is None:
            raise ValueError("a cartoon domain is endless: give the number of shots")
        for name, value in (("shots", shots), ("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= shift < resolution:
            raise ValueError(f"shift must be at least 0 and below the resolution of {resolution} pixels, got {shift}")
        self.root, self.domain, self.wanted_shots = root, domain, shots
        self.resolution, self.batch_size, self.flip, self.shift = resolution, batch_size, flip, shift
        self.seed = 0 if seed is None else seed
        self.reference_root, self.reference_size = reference, reference_size
        self.labels, self.exclude_shots = labels, exclude_shots
        self.samples = {"val": val_samples, "test": test_samples, "predict": predict_samples}
        self.eval_batch_size, self.first_seed = eval_batch_size, first_seed
        self._shots: Tensor | None = None
        self._reference: Tensor | None = None
        self.shot_names: list[str] = []
        self.shot_labels: Tensor | None = None
        self.excluded = 0

    def setup(self, stage: str | None = None) -> None:
        """Decode the shots once, into memory.

        Raises:
            FileNotFoundError, ValueError: a missing or empty place, an unreadable image, no labels where they are
                asked for, or fewer different images than shots.
        """
        if self._shots is not None:
            return
        if self.domain is not None:
            indices = choose_shots(self.domain, int(self.wanted_shots or 0), self.seed)
            self._shots = render_uint8(indices, self.domain, self.resolution)
            self.shot_names = [f"{self.domain}[{i}]" for i in indices]
        else:
            self._shots, rest = self._choose_shots()
            if self.reference_root is None:
                self._reference = rest

    def _choose_shots(self) -> tuple[Tensor, Tensor]:
        source = open_images(str(self.root))
        if self.labels and source.labels is None:
            raise ValueError(f"labels=True, but the images of {self.root!r} come without class labels")
        images = source.load(self.resolution)
        different = self._different(source, images)
        wanted = self.wanted_shots or len(different)
        if len(different) < wanted:
            copies = f" ({len(images)} with copies)" if len(images) > len(different) else ""
            raise ValueError(
                f"{self.root!r} holds {len(different)} images{copies}, but shots={wanted} were asked for: "
                f"add images or set shots to {len(different)} or less"
            )
        order = torch.randperm(len(different), generator=torch.Generator().manual_seed(mix_seed(self.seed, 1)))
        chosen, rest = different[order[:wanted].sort().values], different[order[wanted:].sort().values]
        self.shot_names = [source.names[i] for i in chosen.tolist()]
        if self.labels and source.labels is not None:
            self.shot_labels = torch.tensor(source.labels)[chosen]
        return images[chosen], images[rest] if len(rest) >= 2 and self.exclude_shots else images

    def _different(self, source: ImageSet, images: Tensor) -> Tensor:
        """Indices of ``images`` without copies of an earlier one; copies are told of."""
        first: dict[str, int] = {}
        for i, image in enumerate(images):
            same = first.setdefault(image_hash(image), i)
            if same != i:
                rank_zero_warn(f"{source.names[i]} is the same picture as {source.names[same]}: used once")
        return torch.tensor(sorted(first.values()))

    def _without_shots(self, images: Tensor) -> Tensor:
        """The given reference without the shots, if they are to be left out."""
        assert self._shots is not None
        if not self.exclude_shots:
            return images
        shots = {image_hash(shot) for shot in self._shots}
        kept = [i for i, image in enumerate(images) if image_hash(image) not in shots]
        self.excluded = len(images) - len(kept)
        if not kept:
            raise ValueError(
                f"reference {self.reference_root!r} holds nothing but the shots: give other images, or set "
                f"exclude_shots: false"
            )
        if self.excluded:
            rank_zero_info(f"{self.excluded} of {len(images)} reference images are shots and left out")
        return images[kept]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers of the training data: with the same, a position of the stream is the same."""
        self.setup()
        assert self._shots is not None
        content = image_hash(self._shots.flatten(0, 1))
        return {"shots": content, "seed": self.seed, "flip": self.flip, "shift": self.shift, "batch": self.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the data of the run that is resumed; another batch size is told of.

        Raises:
            RuntimeError: training would go on with other data; names both values.
        """
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        now = self.state_dict()
        changed = [f"{k} was {was!r} and is now {now.get(k)!r}" for k, was in state_dict.items() if was != now.get(k)]
        refused = [text for text in changed if not text.startswith("batch ")]
        if refused:
            raise RuntimeError(
                f"the checkpoint was trained on other data: {'; '.join(refused)}. Resume with the data the run started "
                f"with, or begin a new run without --ckpt_path"
            )
        if changed:
            rank_zero_info(f"Resuming with another batch size: {changed[0]}")

    @property
    def shots(self) -> Tensor:
        """The training images, [k, 3, R, R] float32 in [-1, 1]."""
        self.setup()
        assert self._shots is not None
        return to_float(self._shots)

    @property
    def reference(self) -> Tensor:
        """The images metrics compare with, [N, 3, R, R] uint8: decoded when first asked for, as a run without metrics
        needs none.

        Raises:
            FileNotFoundError, ValueError: a missing or empty place, an unreadable image, or nothing but the shots.
        """
        self.setup()
        if self._reference is None:
            if self.reference_root is not None:
                self._reference = self._without_shots(open_images(self.reference_root).load(self.resolution))
            else:
                assert self.domain is not None
                self._reference = render_uint8(range(self.reference_size), self.domain, self.resolution)
        return self._reference

    def train_dataloader(self) -> DataLoader[Batch]:
        self.setup()
        assert self._shots is not None
        trainer = self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        start = (lambda: trainer.global_step) if trainer is not None else (lambda: 0)
        stream = ShotStream(
            self._shots, self.batch_size, self.flip, self.seed, start, world, rank, self.shift, self.shot_labels
        )
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._seed_loader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._seed_loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._seed_loader("predict")

    def _seed_loader(self, stage: str) -> DataLoader[dict[str, Tensor]]:
        trainer = self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        seeds = torch.arange(self.first_seed, self.first_seed + self.samples[stage])
        batches = [{"seeds": part} for part in seeds[rank::world].split(self.eval_batch_size) if len(part)]
        # The same number of batches on every rank: sliced networks need all ranks at every pass, and Lightning skips
        # the loop of a rank without a batch. Metrics count a seed once.
        most = -(-len(seeds[::world]) // self.eval_batch_size)
        batches += [{"seeds": seeds[:1]}] * (most - len(batches))
        return DataLoader(SeedBatches(batches), batch_size=None)


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
        start: returns the iterations already done; asked whenever an epoch begins.
        world: number of ranks; each takes its own share of every global batch.
        rank: this rank.
        shift: largest translation in pixels, along each axis.
        labels: [N] class numbers, which batches carry then.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        flip: bool,
        seed: int,
        start: Callable[[], int] = lambda: 0,
        world: int = 1,
        rank: int = 0,
        shift: int = 0,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__(batch_size, start, world, rank)
        self.images, self.flip, self.seed, self.shift, self.labels = images, flip, seed, shift, labels
        self._orders: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def batch_at(self, positions: range) -> Batch:
        """The images at ``positions`` of the stream."""
        drawn = [self._image_at(position) for position in positions]
        chosen = [number for number, _ in drawn]
        return Batch(
            to_float(torch.stack([image for _, image in drawn])), None if self.labels is None else self.labels[chosen]
        )

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


def render_uint8(indices: Sequence[int], domain: str, resolution: int) -> Tensor:
    """The cartoons ``indices`` of ``domain`` as [N, 3, R, R] uint8, rendered in parts to bound memory."""
    parts = [indices[i : i + 500] for i in range(0, len(indices), 500)]
    return torch.cat([to_uint8(cartoons.render(part, domain, resolution)) for part in parts])

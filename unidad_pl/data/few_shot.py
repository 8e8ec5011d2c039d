"""The few-shot DataModule: k real images in, endless training batches and evaluation seeds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from unidad_pl.cartoons.shots import choose_shots
from unidad_pl.cartoons.world import check_domain
from unidad_pl.checks import check_arguments, check_given, check_options, check_path, check_whole
from unidad_pl.data.batch import Batch
from unidad_pl.data.choice import CHUNK, SMALL, are_among, choose
from unidad_pl.data.image_sets import BUILTIN, CartoonImages, open_images
from unidad_pl.data.images import Decoded, ImageSet, image_hash, to_grey
from unidad_pl.data.stream import SeedBatches, ShotStream, place_in
from unidad_pl.denoiser import to_float
from unidad_pl.seeds import MOST_SEED

MOST_SIDE, MOST_SAMPLES = 65536, 10_000_000  # no picture is wider, no evaluation larger
FEW = 10
"""Fewer reference images are warned of."""


@dataclass
class Augmentation:
    """How training images are varied.

        >>> still = Augmentation(flip=False)

    Attributes:
        flip: mirror images at random, left to right.
        shift: move images by up to this many whole pixels at random, edges repeated. One or two keep networks from
            knowing a handful of small shots by heart; 0 as in the paper.
    """

    flip: bool = True
    shift: int = 0

    def __post_init__(self) -> None:
        check_options(self)
        check_whole(0, MOST_SIDE, shift=self.shift)


@dataclass
class Reference:
    """The images that metrics compare with.

        >>> held_out = Reference("builtin:cats:200")  # its first 200 renders

    Attributes:
        root: any place :func:`~unidad_pl.data.image_sets.open_images` knows; null: the images of the data's own root
            that are not shots (all of it, if that leaves fewer than 2), for a built-in domain 1000 held-out renders.
        exclude_shots: leave images out that are equal to a shot, pixel for pixel at this resolution. A shot that was
            made of a larger picture of the reference, in another format, is not equal to it.
    """

    root: str | None = None
    exclude_shots: bool = True

    def __post_init__(self) -> None:
        check_options(self)
        check_path(root=self.root)


@dataclass
class Evaluation:
    """Which samples are drawn in evaluations: one per seed, ``first_seed, first_seed + 1, ...``.

        >>> quick = Evaluation(val_samples=100, test_samples=5000)

    Attributes:
        val_samples: seeds at validation.
        test_samples: seeds at test.
        predict_samples: seeds at prediction.
        batch_size: seeds per batch.
        first_seed: the first of them.
    """

    val_samples: int = 500
    test_samples: int = 1000
    predict_samples: int = 64
    batch_size: int = 50
    first_seed: int = 0

    def __post_init__(self) -> None:
        check_whole(0, first_seed=self.first_seed)
        check_whole(1, batch_size=self.batch_size)
        for name in ("val_samples", "test_samples", "predict_samples"):
            check_whole(1, MOST_SAMPLES, **{name: getattr(self, name)})


class FewShotDataModule(pl.LightningDataModule):
    """A few target images for training, seeds for evaluation, a reference set for metrics.

        >>> from unidad_pl import FewShotDataModule
        >>> data = FewShotDataModule("builtin:sunglasses", shots=10, batch_size=4)
        >>> data.shots.shape
        torch.Size([10, 3, 32, 32])
        >>> next(iter(data.train_dataloader())).images.shape
        torch.Size([4, 3, 32, 32])

    Training batches are endless and stateless: the image at position ``p`` of the run is a function of ``(seed, p)``,
    so a resumed run continues where it was and any number of workers or ranks sees the same stream. Validation, test
    and prediction loaders yield sample seeds, each exactly once over all ranks; the module turns them into images.

    Args:
        root: where the images are: a folder (with all folders in it, and linked from it) or a zip of picture files
            (:data:`~unidad_pl.data.images.FORMATS`), an LMDB of the released code, a dataset saved to disk,
            ``hf:NAME[:SPLIT]``, one of the Hugging Face hub, or ``builtin:DOMAIN``: ``faces``, ``sunglasses``,
            ``cats`` or ``sketches`` of the embedded cartoon world.
        shots: number of training images. A place with more gives a random choice by ``seed``, null takes all of it; a
            built-in domain gives renders that are as varied as the domain
            (:func:`~unidad_pl.cartoons.shots.choose_shots`).
        resolution: image side in pixels; must be the model's.
        batch_size: images per iteration and rank.
        seed: of the choice of shots, their order and flips; null: 0, or the command line's ``seed_everything``.
        labels: batches carry the class labels that come with the images (LMDB, Hugging Face), for a class-conditional
            model.
        augmentation: how training images are varied.
        reference: the images that metrics compare with.
        evaluation: which samples are drawn.
        grey: batches of one channel, for a model of one; ``shots`` and ``reference``, for metrics, show it thrice.

    Raises:
        ValueError: a number that makes no sense; names it.
    """

    def __init__(
        self,
        root: str | Path,
        shots: int | None = 10,
        resolution: int = 32,
        batch_size: int = 1,
        seed: int | None = None,
        labels: bool = False,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (values, never mutated)
        reference: Reference = Reference(),  # noqa: B008
        evaluation: Evaluation = Evaluation(),  # noqa: B008
        grey: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(FewShotDataModule.__init__, locals())
        check_given(root=root)
        check_path(root=root)
        root = str(root)
        check_whole(1, null=True, shots=shots)
        check_whole(1, batch_size=batch_size)
        check_whole(1, MOST_SIDE, resolution=resolution)
        check_whole(0, MOST_SEED, null=True, seed=seed)
        if augmentation.shift >= resolution:
            raise ValueError(f"shift must be below the resolution of {resolution} pixels, got {augmentation.shift}")
        self.domain = root.removeprefix(BUILTIN) if root.startswith(BUILTIN) else None
        if self.domain is not None:
            check_domain(self.domain)
            if shots is None:
                raise ValueError(f"{root!r} is endless: give the number of shots")
        self.root, self.wanted_shots = root, shots
        self.resolution, self.batch_size, self.labels, self.grey = resolution, batch_size, labels, grey
        self.seed = 0 if seed is None else seed
        self.augmentation, self.reference_options, self.evaluation = augmentation, reference, evaluation
        self._shots: Tensor | None = None
        self._place: ImageSet | None = None
        self._rest: Sequence[int] = ()
        self._reference: Tensor | None = None
        self._reference_is_shots = False
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
        if self.domain is None:
            place: ImageSet = open_images(self.root)
            place = self._place = Decoded(place, self.resolution) if len(place) <= SMALL else place
            chosen, images, self._rest = choose(place, self.wanted_shots, self.seed, self.resolution, self.root)
        else:
            place = CartoonImages(self.domain, choose_shots(self.domain, int(self.wanted_shots or 0), self.seed))
            chosen, images = list(range(len(place))), place.load(self.resolution)
        if self.labels:
            self.shot_labels = self._labels_of(place, chosen)
        self.shot_names = [place.names[i] for i in chosen]
        self._shots = self._coloured(images)

    def _labels_of(self, place: ImageSet, chosen: list[int]) -> Tensor:
        if place.labels is None:
            raise ValueError(f"labels=True, but the images of {self.root!r} come without class labels")
        for i in chosen:
            if place.labels[i] < 0:
                raise ValueError(
                    f"labels=True, but {place.names[i]!r} of {self.root!r} has the label {place.labels[i]}: give it a "
                    f"class number of 0 or more, or take it out"
                )
        return torch.tensor([place.labels[i] for i in chosen])

    def _coloured(self, images: Tensor) -> Tensor:
        return torch.cat([to_grey(part) for part in images.split(CHUNK)]) if self.grey else images

    @property
    def _pixels(self) -> Tensor:
        """The training images, [k, C, R, R] uint8; C is 1 if grey, else 3."""
        self.setup()
        assert self._shots is not None
        return self._shots

    def _load_reference(self, place: ImageSet, numbers: Sequence[int], exclude: bool) -> Tensor:
        """Pictures of ``place``, each once in memory; without shots if ``exclude``, else it is noted if most are."""
        shots = self._pixels
        images = shots.new_empty(len(numbers), *shots.shape[1:])
        count = copies = 0
        for start in range(0, len(numbers), CHUNK):
            part = self._coloured(place.load(self.resolution, numbers[start : start + CHUNK]))
            known = are_among(shots, part)
            part = part[~known] if exclude else part
            images[count : count + len(part)] = part
            count, copies = count + len(part), copies + int(known.sum()) * (not exclude)
        self._reference_is_shots = 2 * copies > count
        return images[:count]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers of the training data: with the same, a position of the stream is the same."""
        content = image_hash(self._pixels.flatten(0, 1))
        labels = None if self.shot_labels is None else self.shot_labels.tolist()
        own = {"shots": content, "seed": self.seed, "batch": self.batch_size, "labels": labels}
        return own | asdict(self.augmentation)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the data of the run that is resumed; another batch size is allowed, and logged.

        Raises:
            RuntimeError: training would continue with other data; names both values.
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
        return to_float(self._pixels).expand(-1, 3, -1, -1)

    @property
    def reference(self) -> Tensor:
        """The images metrics compare with, [N, 3, R, R] uint8: decoded when first asked for, as a run without metrics
        needs none. Says before training if they are too few, or no others than the shots.

        Raises:
            FileNotFoundError, ValueError: a missing or empty place, an unreadable image, or nothing but the shots.
        """
        self.setup()
        if self._reference is None:
            self._reference = self._given_reference() if self.reference_options.root else self._own_reference()
            count, way_out = len(self._reference), "name more images as data.reference.root"
            if self._reference_is_shots:
                rank_zero_warn(
                    f"most of the {count} reference images are the shots themselves: metrics praise a model that "
                    f"copies them; {way_out}"
                )
            elif count < FEW:
                rank_zero_warn(f"there are {count} reference images: too few for metrics to mean much; {way_out}")
        return self._reference.expand(-1, 3, -1, -1)

    def _own_reference(self) -> Tensor:
        """What is no shot of the data's own root; all of it if that is less than 2."""
        if self._place is None:
            renders = open_images(self.root)
            return self._load_reference(renders, range(len(renders)), exclude=False)
        if len(self._rest) >= 2 and self.reference_options.exclude_shots:
            rest = self._load_reference(self._place, self._rest, exclude=True)
            if len(rest) >= 2:
                return rest
        return self._load_reference(self._place, range(len(self._place)), exclude=False)

    def _given_reference(self) -> Tensor:
        root, exclude = str(self.reference_options.root), self.reference_options.exclude_shots
        place = open_images(root)
        images = self._load_reference(place, range(len(place)), exclude)
        self.excluded = len(place) - len(images)
        if not len(images):
            raise ValueError(
                f"reference {root!r} holds nothing but the shots: give other images, or set exclude_shots: false"
            )
        if self.excluded:
            rank_zero_info(f"{self.excluded} of {len(place)} reference images are shots and left out")
        return images

    @property
    def reference_is_shots(self) -> bool:
        """Whether most of :attr:`reference` are the shots themselves, pixel for pixel: nothing else was there, or
        ``exclude_shots: false``. Metrics then praise a model that copies them."""
        return len(self.reference) > 0 and self._reference_is_shots

    def train_dataloader(self) -> DataLoader[Batch]:
        stream = ShotStream(
            self._pixels, self.batch_size, self.augmentation.flip, self.seed, *place_in(self.trainer),
            self.augmentation.shift, self.shot_labels,
        )  # fmt: skip
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._seed_loader(self.evaluation.val_samples)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._seed_loader(self.evaluation.test_samples)

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._seed_loader(self.evaluation.predict_samples)

    def _seed_loader(self, samples: int) -> DataLoader[dict[str, Tensor]]:
        _, world, rank = place_in(self.trainer)
        first, size = self.evaluation.first_seed, self.evaluation.batch_size
        seeds = torch.arange(first, first + samples)
        batches = [{"seeds": part} for part in seeds[rank::world].split(size) if len(part)]
        # The same number of batches on every rank: sharded networks need all ranks at every pass, and Lightning skips
        # the loop of a rank without a batch. Metrics count a seed once.
        most = -(-len(seeds[::world]) // size)
        batches += [{"seeds": seeds[:1]}] * (most - len(batches))
        return DataLoader(SeedBatches(batches), batch_size=None)

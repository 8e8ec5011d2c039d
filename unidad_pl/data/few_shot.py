"""The few-shot DataModule: k real images in, endless training batches and evaluation seeds out."""

from __future__ import annotations

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
from unidad_pl.checks import check_at_least
from unidad_pl.data.batch import Batch
from unidad_pl.data.image_sets import BUILTIN, CartoonImages, ImageSet, open_images
from unidad_pl.data.images import image_hash
from unidad_pl.data.stream import SeedBatches, ShotStream, place_in
from unidad_pl.denoiser import to_float
from unidad_pl.seeds import mix_seed


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
        check_at_least(0, shift=self.shift)


@dataclass
class Reference:
    """The images that metrics compare with.

        >>> held_out = Reference("builtin:cats:200")  # its first 200 renders

    Attributes:
        root: any place :func:`~unidad_pl.data.image_sets.open_images` knows; null: the images of the data's own root
            that are not shots (all of it, if that leaves fewer than 2), for a built-in domain 1000 held-out renders.
        exclude_shots: leave images out that are equal to a shot, pixel for pixel at this resolution.
    """

    root: str | None = None
    exclude_shots: bool = True


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
        check_at_least(0, first_seed=self.first_seed)
        check_at_least(1, val_samples=self.val_samples, test_samples=self.test_samples,
                       predict_samples=self.predict_samples, batch_size=self.batch_size)  # fmt: skip


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
        root: where the images are: a folder (with all folders in it) or a zip of PNG, JPEG, WebP or BMP files, an LMDB
            of the released code, a dataset saved to disk, ``hf:NAME[:SPLIT]``, one of the Hugging Face hub, or
            ``builtin:DOMAIN``: ``faces``, ``sunglasses`` or ``cats`` of the embedded cartoon world.
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
    ) -> None:
        super().__init__()
        root = str(root)
        check_at_least(1, shots=shots, batch_size=batch_size)
        if augmentation.shift >= resolution:
            raise ValueError(f"shift must be below the resolution of {resolution} pixels, got {augmentation.shift}")
        self.domain = root.removeprefix(BUILTIN) if root.startswith(BUILTIN) else None
        if self.domain is not None:
            check_domain(self.domain)
            if shots is None:
                raise ValueError(f"{root!r} is endless: give the number of shots")
        self.root, self.wanted_shots = root, shots
        self.resolution, self.batch_size, self.labels = resolution, batch_size, labels
        self.seed = 0 if seed is None else seed
        self.augmentation, self.reference_options, self.evaluation = augmentation, reference, evaluation
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
        if self.domain is None:
            images = open_images(self.root)
        else:
            images = CartoonImages(self.domain, choose_shots(self.domain, int(self.wanted_shots or 0), self.seed))
        if self.labels and images.labels is None:
            raise ValueError(f"labels=True, but the images of {self.root!r} come without class labels")
        self._shots, rest = self._choose_shots(images)
        if self.reference_options.root is None:
            self._reference = rest

    def _choose_shots(self, place: ImageSet) -> tuple[Tensor, Tensor | None]:
        """The shots, and what is left of their place, if that is to be the reference."""
        images = place.load(self.resolution)
        if self.domain is not None:
            self.shot_names = place.names
            return images, None
        different = self._different(place, images)
        wanted = self.wanted_shots or len(different)
        if len(different) < wanted:
            copies = f" ({len(images)} with copies)" if len(images) > len(different) else ""
            raise ValueError(
                f"{self.root!r} holds {len(different)} images{copies}, but shots={wanted} were asked for: "
                f"add images or set shots to {len(different)} or less"
            )
        order = torch.randperm(len(different), generator=torch.Generator().manual_seed(mix_seed(self.seed, 1)))
        chosen, rest = different[order[:wanted].sort().values], different[order[wanted:].sort().values]
        self.shot_names = [place.names[i] for i in chosen.tolist()]
        if self.labels and place.labels is not None:
            self.shot_labels = torch.tensor(place.labels)[chosen]
        return images[chosen], images[rest] if len(rest) >= 2 and self.reference_options.exclude_shots else images

    def _different(self, place: ImageSet, images: Tensor) -> Tensor:
        """Indices of ``images`` without copies of an earlier one, after a warning that names both."""
        first: dict[str, int] = {}
        for i, image in enumerate(images):
            same = first.setdefault(image_hash(image), i)
            if same != i:
                rank_zero_warn(f"{place.names[i]} is the same picture as {place.names[same]}: used once")
        return torch.tensor(sorted(first.values()))

    @property
    def _pixels(self) -> Tensor:
        """The training images, [k, 3, R, R] uint8."""
        self.setup()
        assert self._shots is not None
        return self._shots

    def _without_shots(self, images: Tensor) -> Tensor:
        """The given reference without the shots, if they are to be left out."""
        if not self.reference_options.exclude_shots:
            return images
        shots = {image_hash(shot) for shot in self._pixels}
        kept = [i for i, image in enumerate(images) if image_hash(image) not in shots]
        self.excluded = len(images) - len(kept)
        if not kept:
            raise ValueError(
                f"reference {self.reference_options.root!r} holds nothing but the shots: give other images, or set "
                f"exclude_shots: false"
            )
        if self.excluded:
            rank_zero_info(f"{self.excluded} of {len(images)} reference images are shots and left out")
        return images[kept]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers of the training data: with the same, a position of the stream is the same."""
        content = image_hash(self._pixels.flatten(0, 1))
        return {"shots": content, "seed": self.seed, "batch": self.batch_size, **asdict(self.augmentation)}

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
        return to_float(self._pixels)

    @property
    def reference(self) -> Tensor:
        """The images metrics compare with, [N, 3, R, R] uint8: decoded when first asked for, as a run without metrics
        needs none.

        Raises:
            FileNotFoundError, ValueError: a missing or empty place, an unreadable image, or nothing but the shots.
        """
        self.setup()
        if self._reference is None:
            images = open_images(self.reference_options.root or self.root).load(self.resolution)
            self._reference = images if self.reference_options.root is None else self._without_shots(images)
        return self._reference

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

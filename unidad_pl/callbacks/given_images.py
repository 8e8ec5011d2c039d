"""Images a callback compares with: a tensor, a folder, or what the DataModule offers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from unidad_pl.data.image_sets import open_images
from unidad_pl.denoiser import to_float

Images = str | Path | Tensor | None


class GivenImages:
    """Images that are an argument of a callback, or else an attribute of the DataModule.

    Args:
        owner: name of the callback, for errors.
        argument: what the callback calls them: ``reference``, ``shots`` or ``photos``.
        given: [N, 3, H, W] uint8, or float in [-1, 1]; or a place, see
            :func:`~unidad_pl.data.image_sets.open_images`; None: ``trainer.datamodule.<attribute>``.
        attribute: what the DataModule calls them; default: the same.
    """

    def __init__(self, owner: str, argument: str, given: Images, attribute: str | None = None) -> None:
        self.owner, self.argument, self.given = owner, argument, given
        self.attribute = argument if attribute is None else attribute
        self.what = "reference images" if argument == "reference" else argument

    def check(self, trainer: pl.Trainer) -> None:
        """Fail early, before anything is trained.

        Raises:
            ValueError: neither given nor offered by the DataModule, or not an image tensor.
            FileNotFoundError: no such place, or no image in it.
        """
        if isinstance(self.given, (str, Path)):
            open_images(self.given)
        else:
            self._tensor(trainer)

    def _tensor(self, trainer: pl.Trainer) -> Tensor:
        images = self.given
        if images is None:
            datamodule = getattr(trainer, "datamodule", None)
            images = getattr(datamodule, self.attribute, None)
            if images is None:
                seen = "there is no datamodule" if datamodule is None else f"{type(datamodule).__name__} offers none"
                raise ValueError(
                    f"{self.owner} needs {self.what}, and {seen} (attribute {self.attribute!r}): pass "
                    f"{self.argument}=<a folder, or a tensor [N, 3, H, W]>"
                )
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            seen = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"{self.owner}: {self.argument} must be a tensor [N, 3, H, W], N >= 1, got {seen}")
        if images.dtype != torch.uint8:
            check_range(images, f"{self.owner}: {self.argument}")
        return images

    def load(self, trainer: pl.Trainer, size: tuple[int, int] | None) -> Tensor:
        """The images at the samples' size (height, width): [N, 3, H, W] uint8 or float in [-1, 1].

        Raises:
            ValueError: they have another size.
        """
        assert size is not None  # the size of an evaluation is known once it has a sample
        if isinstance(self.given, (str, Path)):
            if size[0] != size[1]:
                raise ValueError(
                    f"{self.owner}: images from a folder are made square but samples are {size[0]}x{size[1]}: pass "
                    f"{self.argument} as a tensor of that size"
                )
            return open_images(self.given).load(size[0])
        images = self._tensor(trainer)
        if tuple(images.shape[2:]) != tuple(size):
            raise ValueError(
                f"{self.owner}: samples are {size[0]}x{size[1]} but {self.what} are "
                f"{images.shape[2]}x{images.shape[3]}: give both the same resolution"
            )
        return images

    def share(
        self, trainer: pl.Trainer, size: tuple[int, int] | None, device: torch.device, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the images: batches [B, 3, H, W] float in [-1, 1] on ``device``, and their numbers [B].

        Raises:
            ValueError: they have another size than the samples.
        """
        images = self.load(trainer, size)
        own = torch.arange(trainer.global_rank, len(images), trainer.world_size)
        for numbers in own.split(batch_size):
            yield model_range(images[numbers].to(device)), numbers


def model_range(images: Tensor) -> Tensor:
    """uint8 or float images -> float32 in [-1, 1]."""
    return to_float(images) if images.dtype == torch.uint8 else images.float()


def check_range(images: Tensor, what: str) -> None:
    """Refuse float images with values outside [-1, 1], give or take some rounding.

    Raises:
        ValueError: says which values they have.
    """
    low, high = float(images.min()), float(images.max())
    if not (low >= -1.01 and high <= 1.01):  # so that NaN fails too
        raise ValueError(f"{what} must be floats in [-1, 1], got values from {low:.4g} to {high:.4g}")

"""Images a callback compares with: a tensor, a folder, or what the DataModule offers."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from unidad_pl.denoiser import to_float
from unidad_pl.data.image_sets import open_images

Images = str | Path | Tensor | None


class ImageSource:
    """Where a callback finds its reference images or shots.

    Args:
        owner: name of the callback, for errors.
        attribute: ``reference`` or ``shots``: the callback's argument and the DataModule's attribute.
        given: [N, 3, H, W] uint8, or float in [-1, 1]; or a place, see
            :func:`~unidad_pl.data.image_sets.open_images`; None: ``trainer.datamodule.<attribute>``.
    """

    def __init__(self, owner: str, attribute: str, given: Images) -> None:
        self.owner, self.attribute, self.given = owner, attribute, given

    def check(self, trainer: pl.Trainer) -> None:
        """Fail early, before anything is trained.

        Raises:
            ValueError: neither given nor offered by the DataModule, or no image tensor.
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
                    f"{self.owner} needs {self.attribute} images, and {seen} (attribute {self.attribute!r}): pass "
                    f"{self.attribute}=<a folder, or a tensor [N, 3, H, W]>"
                )
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            seen = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"{self.owner}: {self.attribute} must be a tensor [N, 3, H, W], N >= 1, got {seen}")
        if images.dtype != torch.uint8:
            check_range(images, f"{self.owner}: {self.attribute}")
        return images

    def load(self, trainer: pl.Trainer, size: tuple[int, int]) -> Tensor:
        """The images at the samples' size (height, width): [N, 3, H, W] uint8 or float in [-1, 1].

        Raises:
            ValueError: they have another size.
        """
        if isinstance(self.given, (str, Path)):
            if size[0] != size[1]:
                raise ValueError(
                    f"{self.owner}: pictures of a folder are made square but samples are {size[0]}x{size[1]}: pass "
                    f"{self.attribute} as a tensor of that size"
                )
            return open_images(self.given).load(size[0])
        images = self._tensor(trainer)
        if tuple(images.shape[2:]) != tuple(size):
            raise ValueError(
                f"{self.owner}: samples are {size[0]}x{size[1]} but {self.attribute} images are "
                f"{images.shape[2]}x{images.shape[3]}: give both the same resolution"
            )
        return images


def model_range(images: Tensor) -> Tensor:
    """uint8 or float images -> float32 in [-1, 1]."""
    return to_float(images) if images.dtype == torch.uint8 else images.float()


def check_range(images: Tensor, what: str) -> None:
    """Refuse float images outside [-1, 1], with a little room for rounding.

    Raises:
        ValueError: the range seen.
    """
    low, high = float(images.min()), float(images.max())
    if not (low >= -1.01 and high <= 1.01):  # so that NaN fails too
        raise ValueError(f"{what} must be floats in [-1, 1], got values from {low:.4g} to {high:.4g}")

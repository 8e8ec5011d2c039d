"""Images as callbacks take them: one rule for what a step returns and for what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from unidad_pl.data.colours import as_shown
from unidad_pl.data.image_sets import open_images
from unidad_pl.denoiser import to_float
from unidad_pl.files import expanded
from unidad_pl.metrics.features import float_images

Images = str | Path | Tensor | Sequence[Any] | None


def as_images(value: Any, what: str) -> Tensor:
    """Samples, references, shots and photos, in the one form of all: [N, 3, H, W] uint8, or float in [-1, 1].

        >>> as_images([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)], "samples").shape
        torch.Size([2, 3, 8, 8])

    Args:
        value: [N, C, H, W] with 3 channels, or 1 that is repeated, as uint8 or as floats in [-1, 1]; or a list of such
            images [C, H, W], or of PIL images, all of one size.
        what: how errors call them.

    Raises:
        ValueError: anything else, NaN, or values outside [-1, 1].
    """
    if isinstance(value, (list, tuple)):
        value = _stacked(value, what)
    if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[1] not in (1, 3) or not value.numel():
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} must be a tensor [N, 3, H, W], N >= 1, or a list of images, got {got}")
    value = value.detach()
    return value.expand(-1, 3, -1, -1) if value.dtype == torch.uint8 else float_images(value, what)


def _stacked(images: Sequence[Any], what: str) -> Tensor:
    import numpy as np
    from PIL import Image

    rows = [
        torch.from_numpy(np.array(as_shown(one, what))).permute(2, 0, 1) if isinstance(one, Image.Image) else one
        for one in images
    ]
    kinds = {f"{tuple(row.shape)} {row.dtype}" if isinstance(row, Tensor) else type(row).__name__ for row in rows}
    if len(kinds) != 1 or not all(isinstance(row, Tensor) and row.ndim == 3 for row in rows):
        raise ValueError(
            f"{what} must be a list of tensors [3, H, W] or of PIL images, all of one size and type, got "
            f"{', '.join(sorted(kinds)) or 'an empty list'}"
        )
    return torch.stack(rows)


def model_range(images: Tensor) -> Tensor:
    """uint8 or float images -> float32 in [-1, 1]."""
    return to_float(images) if images.dtype == torch.uint8 else images.float()


class GivenImages:
    """Images that are an argument of a callback, or else an attribute of the DataModule.

    Args:
        owner: name of the callback, for errors.
        argument: what the callback calls them: ``reference``, ``shots`` or ``photos``.
        given: see :func:`as_images`; or a place, see :func:`~unidad_pl.data.image_sets.open_images`; None:
            ``trainer.datamodule.<attribute>``.
        attribute: what the DataModule calls them; default: the same.
    """

    def __init__(self, owner: str, argument: str, given: Images, attribute: str | None = None) -> None:
        self.owner, self.argument, self.given = owner, argument, given
        self.attribute = argument if attribute is None else attribute
        self.what = "reference images" if argument == "reference" else argument
        self._seen: Any = None
        self._warned = False

    def check(self, trainer: pl.Trainer, least: int = 1) -> int:
        """Fail early, before anything is trained.

        Returns:
            How many images there are.

        Raises:
            ValueError: neither given nor offered by the DataModule, not images, or fewer than ``least``.
            FileNotFoundError: no such place, or no image in it.
        """
        if isinstance(self.given, (str, Path)):
            count = len(open_images(self.given))
        else:
            images = self._tensor(trainer)
            count = len(images)
            if images.dtype != torch.uint8 and float(images.min()) >= 0 and not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"{self.owner}: the {self.what} have no value below 0, but images are floats in [-1, 1] (or "
                    f"uint8): are these in [0, 1]? Then give 2 * images - 1"
                )
        if count < least:
            raise ValueError(f"{self.owner} needs at least {least} {self.what}, got {count}: give more images")
        return count

    def are_shots(self, trainer: pl.Trainer) -> bool:
        """Whether the DataModule says that its reference set is the shots themselves, and it is this one."""
        return self.given is None and bool(
            getattr(getattr(trainer, "datamodule", None), f"{self.attribute}_is_shots", False)
        )

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
        return as_images(images, f"{self.owner}: {self.argument}")

    def check_size(self, trainer: pl.Trainer, size: tuple[int, int]) -> None:
        """Compare with the samples' size (height, width).

        Raises:
            ValueError: they have another size.
        """
        if isinstance(self.given, (str, Path)):
            if size[0] != size[1]:
                raise ValueError(
                    f"{self.owner}: images from a folder are made square but samples are {size[0]}x{size[1]}: pass "
                    f"{self.argument} as a tensor of that size"
                )
            return
        height, width = self._tensor(trainer).shape[2:]
        if (height, width) != tuple(size):
            raise ValueError(
                f"{self.owner}: samples are {size[0]}x{size[1]} but {self.what} are {height}x{width}: give both the "
                f"same resolution"
            )

    def load(self, trainer: pl.Trainer, size: tuple[int, int] | None) -> Tensor:
        """The images at the samples' size (height, width): [N, 3, H, W] uint8 or float in [-1, 1].

        Raises:
            ValueError: they have another size.
        """
        assert size is not None  # the size of an evaluation is known once it has a sample
        self.check_size(trainer, size)
        if isinstance(self.given, (str, Path)):
            return open_images(self.given).load(size[0])
        return self._tensor(trainer)

    def forget(self) -> None:
        """Let them be new to the next call of :meth:`are_new`."""
        self._seen = None

    def are_new(self, trainer: pl.Trainer, size: tuple[int, int] | None) -> bool:
        """Whether they are others than at the last call, which another run of the trainer may have made."""
        before = self._seen
        if isinstance(self.given, (str, Path)):
            self._seen = (size, open_images(self.given).names, _stamps(expanded(self.given)))
            return bool(before != self._seen)
        images = self._tensor(trainer)
        self._seen = (images, 0 if images.is_inference() else images._version)
        if before is None:
            return True
        changed_in_place = before[0].data_ptr() == images.data_ptr() and before[1] != self._seen[1]
        return changed_in_place or before[0].dtype != images.dtype or not torch.equal(before[0], images)


def _stamps(place: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the files at a place: others may have taken their names."""
    files = [place, *(place.rglob("*") if place.is_dir() else [])]
    # A link may lead nowhere.
    return sorted((str(file), (seen := file.stat()).st_size, seen.st_mtime_ns) for file in files if file.exists())


def own_share(trainer: pl.Trainer, count: int) -> Tensor:
    """The numbers of this rank's share of ``count`` images."""
    return torch.arange(trainer.global_rank, count, trainer.world_size)


def share(
    trainer: pl.Trainer, images: Tensor, device: torch.device, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of images [N, 3, H, W]: batches [B, 3, H, W] float in [-1, 1] on ``device``, and their numbers
    [B]."""
    for numbers in own_share(trainer, len(images)).split(batch_size):
        yield model_range(images[numbers].to(device)), numbers

"""What a training loader yields, and what the networks see of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from unidad_pl.checks import check_at_least, check_given
from unidad_pl.condition import Condition


@dataclass
class Batch:
    """One iteration's real images on one rank.

        >>> import torch
        >>> batch = Batch(torch.zeros(2, 3, 32, 32), labels=torch.tensor([0, 1]))

    Attributes:
        images: [B, C, H, W] float32 in [-1, 1].
        labels: class labels [B] int64, or None.
        prompts: B prompts instead, for a text-to-image model.
        source_prompts: the source teacher's in their place, e.g. without the subject's rare token; None: the same.
        prior: images of the subject's class and their prompts, as many as images, that the target teacher must not
            forget; None: none.
        weight: of the loss on this batch, where it is a ``prior``.
    """

    images: Tensor
    labels: Tensor | None = None
    prompts: list[str] | None = None
    source_prompts: list[str] | None = None
    prior: Batch | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_given(weight=self.weight)
        check_at_least(0, weight=self.weight)


@dataclass
class EncodedBatch:
    """A part of a batch as the networks see it.

    Attributes:
        images: [B, C, H, W] images or latents.
        cond: condition of the B rows, or None.
        source_cond: the source teacher's condition, where it is another one; None: ``cond``.
        prior: the same rows of the batch's ``prior``.
        weight: of the loss on these images, where they are a ``prior``.
        last: whether it is the batch's last part: gradients are complete with it.
    """

    images: Tensor
    cond: Condition | None = None
    source_cond: Condition | None = None
    prior: EncodedBatch | None = None
    weight: float = 1.0
    last: bool = True


def as_batch(given: Any) -> Batch:
    """What a training loader yields, as a :class:`Batch`.

        >>> import torch
        >>> as_batch((torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))).labels
        tensor([0, 1])

    Args:
        given: a batch; images alone; images and their class labels, or their prompts, as a tuple or list; or a dict
            with the names of a batch's attributes.

    Raises:
        TypeError: something else, or images that are no float tensor [B, C, H, W]; says what was found.
    """
    parts: dict[str, Any] = {}
    if isinstance(given, Batch):
        return given
    if isinstance(given, Tensor):
        parts = {"images": given}
    elif isinstance(given, (list, tuple)) and len(given) in (1, 2):
        texts = len(given) == 2 and isinstance(given[1], (list, tuple))
        parts = dict(zip(("images", "prompts" if texts else "labels"), given, strict=False))
    elif isinstance(given, Mapping):
        parts = {str(name): value for name, value in given.items()}
    names = [field.name for field in fields(Batch)]
    images = parts.get("images")
    if not set(parts) <= set(names) or not isinstance(images, Tensor) or images.ndim != 4:
        raise TypeError(
            f"a training batch is a float tensor of images [B, C, H, W] in [-1, 1]; images and labels [B], or B "
            f"prompts, as a tuple; a dict with some of {', '.join(names)}; or a unidad_pl.Batch. Got {_shown(given)}"
        )
    if not images.is_floating_point():
        raise TypeError(f"training images must be floats in [-1, 1], got {images.dtype}: x / 127.5 - 1 makes them so")
    return Batch(**parts)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} {value.dtype}"
    if isinstance(value, Mapping):
        return "a dict of " + ", ".join(f"{name}: {_shown(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of " + ", ".join(_shown(part) for part in value[:4])
    return type(value).__name__

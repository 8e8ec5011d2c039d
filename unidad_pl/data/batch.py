"""What a training loader yields, and what the networks see of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """One iteration's real images on one rank.

    Attributes:
        images: [B, C, H, W] float32 in [-1, 1].
        cond: condition of the B rows (class labels [B] int64), or None.
        prompts: B prompts instead, for a text-to-image model.
        source_prompts: the source teacher's in their place, e.g. without the subject's rare token; None: the same.
        prior: images of the subject's class and their prompts, as many as images, that the target teacher must not
            forget; None: none.
        weight: of the loss on this batch, where it is a ``prior``.
    """

    images: Tensor
    cond: Tensor | None = None
    prompts: list[str] | None = None
    source_prompts: list[str] | None = None
    prior: Batch | None = None
    weight: float = 1.0


@dataclass
class EncodedBatch:
    """A part of a batch as the networks see it.

    Attributes:
        images: [B, C, H, W] images or latents.
        cond: condition of the B rows, or None.
        source_cond: the source teacher's condition, where it is another one; None: ``cond``.
        prior: the same rows of the batch's ``prior``.
        weight: of the loss on these images, where they are a ``prior``.
    """

    images: Tensor
    cond: Tensor | None = None
    source_cond: Tensor | None = None
    prior: EncodedBatch | None = None
    weight: float = 1.0

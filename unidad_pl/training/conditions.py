"""What networks are conditioned on: class labels, drawn where the data has none, and prompts, refused early if bad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from unidad_pl.backbones.latents import check_length
from unidad_pl.data.batch import Batch, EncodedBatch
from unidad_pl.denoiser import Codec, Denoiser

MANY_PIECES = 3
"""Pieces of a rare token from which on it hardly is one word to the text encoder."""

LOOK = 1000
"""Iterations from one look at the values of a batch to the next."""


class ClassLabels:
    """The classes a run uses of a class-conditional model.

    Args:
        num_classes: classes of the model; None: it is unconditional and has no labels.
        chosen: the classes to use; None: all of them.

    Raises:
        ValueError: ``chosen`` is empty, names a class the model has not, or is given for an unconditional model.
    """

    def __init__(self, num_classes: int | None, chosen: Sequence[int] | None = None) -> None:
        if chosen is not None and num_classes is None:
            raise ValueError(f"classes={list(chosen)} were given, but the model is unconditional: leave classes null")
        if chosen is not None and (not chosen or any(not 0 <= c < (num_classes or 0) for c in chosen)):
            raise ValueError(f"classes must be some of 0..{(num_classes or 0) - 1}, got {list(chosen)}")
        self.num_classes = num_classes
        self.classes = list(range(num_classes or 0)) if chosen is None else list(chosen)

    def check(self, labels: Tensor | None, count: int) -> None:
        """Refuse labels [B] that do not fit ``count`` images and the model, before an embedding fails on them.

        Raises:
            ValueError: labels for an unconditional model, another number of them, or one out of range.
        """
        if labels is None:
            return
        if self.num_classes is None:
            raise ValueError("the batch carries class labels, but the model is unconditional: set labels off")
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels must be a tensor of {count} whole numbers, got {labels!r:.80}")
        if labels.shape != (count,) or labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise ValueError(f"{count} images need {count} integer labels, got {tuple(labels.shape)} {labels.dtype}")
        if count and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
            raise ValueError(
                f"labels must be in 0..{self.num_classes - 1}, the model's classes; got {int(labels.min())} to "
                f"{int(labels.max())}"
            )

    def draw(self, count: int, device: torch.device) -> Tensor | None:
        """``count`` labels int64, uniformly over the classes, from torch's global random state, or None."""
        if self.num_classes is None:
            return None
        classes = torch.tensor(self.classes, device=device)
        return classes[torch.randint(len(classes), (count,), device=device)]

    def of_seeds(self, seeds: Tensor) -> Tensor | None:
        """The labels of sample ``seeds`` [B]: the classes in turn, seed 0 the first; None without classes."""
        if self.num_classes is None:
            return None
        return torch.tensor(self.classes, device=seeds.device)[seeds % len(self.classes)]


def check_prompts(codec: Codec, data: Any) -> None:
    """Read the prompts that ``data`` will ever serve (its ``every_prompt``, if it has one) before training begins.

    Warns of a rare token that the tokenizer splits into many pieces.

    Raises:
        ValueError: a prompt with more tokens than the text encoder reads.
    """
    prompts = getattr(data, "every_prompt", None)
    if not prompts or (reader := codec.reader()) is None:
        return
    for prompt in prompts:
        check_length(reader, prompt)
    token = getattr(data, "token", None)
    pieces = reader[0].tokenize(token) if token else []
    if len(pieces) >= MANY_PIECES:
        rank_zero_warn(
            f"the text encoder reads the rare token {token!r} as {len(pieces)} pieces ({' '.join(pieces)}), which "
            f"other words share: a word of one or two pieces, such as 'sks' in CLIP, learns the subject better"
        )


def encode_prior(prior: Batch | None, rows: slice, codec: Codec) -> EncodedBatch | None:
    """The rows of a ``prior``, encoded; latents are drawn from torch's random state.

    Raises:
        ValueError: a prior without prompts.
    """
    if prior is None:
        return None
    if prior.prompts is None:
        raise ValueError("images of the class (prior) need prompts that say what they show")
    cond = codec.embed(prior.prompts[rows], prior.images.device)
    return EncodedBatch(codec.encode(prior.images[rows]), cond, weight=prior.weight)


def _warn_of_range(images: Tensor) -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(images, FakeTensor):  # of a rehearsal: they have no values
        return
    least, most = float(images.min()), float(images.max())
    if not -1.01 <= least <= most <= 1.01:
        rank_zero_warn(
            f"the training images are in [{least:.4g}, {most:.4g}], and pictures must be in [-1, 1]: x / 127.5 - 1 "
            f"makes them so of 0 to 255"
        )


def check_shots(data: Any, codec: Codec, network: Denoiser) -> None:
    """Compare the shots of a data module, if it has any, with what the model works on: before the first evaluation.

    Raises:
        ValueError: they have another size or number of channels; says what to set.
    """
    shots = getattr(data, "shots", None)
    if isinstance(shots, Tensor) and shots.ndim == 4:
        _check_pixels(shots, codec, network)


def _check_pixels(images: Tensor, codec: Codec, network: Denoiser) -> None:
    pixels = tuple(network.image_shape)
    if type(codec) is Codec and tuple(images.shape[1:]) != pixels:  # others make their images of any
        wanted = [f"resolution (--data.resolution) to {pixels[1]}"] if images.shape[2] != pixels[1] else []
        wanted += [f"grey (--data.grey) to {str(pixels[0] == 1).lower()}"] if images.shape[1] != pixels[0] else []
        raise ValueError(
            f"the data module serves images of {tuple(images.shape[1:])}, but the model works on {pixels}: set the "
            f"data module's {' and its '.join(wanted)}"
        )


def check_batch(
    batch: Batch, codec: Codec, network: Denoiser, parts: int, takes_prior: bool, iteration: int
) -> None:  # fmt: skip
    """Refuse a training batch that does not fit the model.

    Args:
        batch: what the data module serves.
        codec, network: of the model.
        parts: micro-batches to split it into.
        takes_prior: whether anything learns from its ``prior``.
        iteration: the values are looked at in every :data:`LOOK`-th, since a look waits for the device.

    Raises:
        ValueError: says what does not fit, and what to set.
    """
    images = batch.images
    if not len(images):
        raise ValueError("a training batch is empty: the data module must serve at least one image in each")
    if iteration % LOOK == 0:
        _warn_of_range(images)
    _check_pixels(images, codec, network)
    if len(images) % parts:
        raise ValueError(f"a batch of {len(images)} images cannot be split into accumulate={parts} parts")
    if batch.prior is not None and not takes_prior:
        raise ValueError(
            "only a target teacher that is trained learns from pictures of the class: leave the data's prior out, or "
            "give the target teacher a weight and an adaptation"
        )

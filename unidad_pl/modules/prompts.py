"""What a module does with the prompts of a data module: refuse bad ones early, and encode pictures of the class."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from unidad_pl.data.batch import Batch, EncodedBatch
from unidad_pl.denoiser import Codec

MANY_PIECES = 3
"""Pieces of a rare token from which on it hardly is one word to the text encoder."""


def check_prompts(codec: Codec, data: Any) -> None:
    """Read the prompts that ``data`` will ever serve (its ``every_prompt``, if it has one) before training begins.

    Warns of a rare token that the tokenizer splits into many pieces.

    Raises:
        ValueError: a prompt with more tokens than the text encoder reads.
    """
    prompts = getattr(data, "every_prompt", None)
    if not prompts or type(codec) is Codec:
        return
    parts: Any = getattr(codec, "parts", None)
    tokenizer = getattr(parts, "tokenizer", None)
    if tokenizer is None:
        return
    most = tokenizer.model_max_length
    for prompt in prompts:
        if (tokens := len(tokenizer(prompt).input_ids)) > most:
            raise ValueError(f"the prompt {prompt!r} has {tokens} tokens, {most} can be read: make it shorter")
    token = getattr(data, "token", None)
    pieces = tokenizer.tokenize(token) if token else []
    if len(pieces) >= MANY_PIECES:
        rank_zero_warn(
            f"the text encoder reads the rare token {token!r} as {len(pieces)} pieces ({' '.join(pieces)}), which "
            f"other words share: a word of one or two pieces, such as 'sks' in CLIP, learns the subject better"
        )


def encode_prior(prior: Batch | None, rows: slice, codec: Codec, trains_target: bool) -> EncodedBatch | None:
    """The rows of a ``prior``, encoded; latents are drawn from torch's random state.

    Raises:
        ValueError: a prior without prompts, or one that nothing learns from.
    """
    if prior is None:
        return None
    if not trains_target:
        raise ValueError(
            "only a target teacher that is trained learns from pictures of the class: leave the data's class_images "
            "out, or use target: train with a target_weight above 0"
        )
    if prior.prompts is None:
        raise ValueError("images of the class (prior) need prompts that say what they show")
    cond = codec.embed(prior.prompts[rows], prior.images.device)
    return EncodedBatch(codec.encode(prior.images[rows]), cond, weight=prior.weight)

"""Z-Image (Alibaba 2025), Turbo among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unidad_pl.backbones.folders import MOST_SIDE
from unidad_pl.backbones.lora import ATTENTION
from unidad_pl.backbones.transformer import QWEN3_TEMPLATE, QWEN3_TOKENS, TransformerNetwork
from unidad_pl.checks import check_whole
from unidad_pl.condition import Condition

PATCH, FRAMES = 2, 1


class ZImageNetwork(TransformerNetwork):
    """A ``ZImageTransformer2DModel``. It takes lists of images and of prompts, each of its own length, a time that goes
    from 0 (noise) to 1, and answers ``x0 - eps``.

        >>> ZImageNetwork.sizes({"in_channels": 16, "dim": 3840})
        (16, 2, 3840)
    """

    diffusers_class, pipeline = "ZImageTransformer2DModel", "ZImagePipeline"
    output_layer = f"all_final_layer.{PATCH}-{FRAMES}.linear"
    lists = ("layers",)
    adapted = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    masks, axes = True, ("axes_dims", 3)

    def __init__(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(transformer, *args, **kwargs)
        side, config = self.image_shape[1] // PATCH, self.transformer.config
        for axis, least in enumerate((QWEN3_TOKENS + 2, side, side)):  # images stand two places behind their prompt
            check_whole(least, MOST_SIDE, **{f"axes_lens[{axis}]": config["axes_lens"][axis]})

    text_parts = {"text_encoder": "Qwen3Model", "tokenizer": "Qwen2TokenizerFast"}  # noqa: RUF012
    most_tokens, chats = QWEN3_TOKENS - QWEN3_TEMPLATE, True

    @classmethod
    def encoded(cls, pipe: Any, prompt: str, device: torch.device | str) -> Condition:
        (tokens,), _ = pipe.encode_prompt([prompt], device=device, do_classifier_free_guidance=False)
        return Condition(tokens=tokens[None])

    @classmethod
    def sizes(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return config["in_channels"], PATCH, config["dim"]

    @classmethod
    def text_sizes(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return QWEN3_TOKENS, config["cap_feat_dim"], 0

    def _call(self, scaled: Tensor, time: Tensor, cond: Condition) -> Tensor:
        assert cond.tokens is not None
        tokens = cond.tokens.to(self.dtype)
        prompts = (
            list(tokens) if cond.mask is None else [row[mask] for row, mask in zip(tokens, cond.mask, strict=True)]
        )
        output = self.transformer(
            list(scaled[:, :, None]),
            1 - time / self.spec.train_timesteps,
            prompts,
            patch_size=PATCH,
            f_patch_size=FRAMES,
        ).sample
        return -torch.stack(output)[:, :, 0]

    def _image_tokens(self, output: Any, count: int) -> Tensor:
        return output[:, :count]

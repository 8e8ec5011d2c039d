"""Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unidad_pl.backbones.transformer import CONTEXT_FORWARD, JOINT, TransformerNetwork
from unidad_pl.condition import Condition

CLIP_TOKENS, T5_TOKENS = 77, 256


class SD3Network(TransformerNetwork):
    """A ``SD3Transformer2DModel``. Its time is in timesteps; its attention knows no mask.

    >>> SD3Network.text_sizes({"joint_attention_dim": 4096, "pooled_projection_dim": 2048})
    (333, 4096, 2048)
    """

    diffusers_class, pipeline = "SD3Transformer2DModel", "StableDiffusion3Pipeline"
    adapted = (*TransformerNetwork.adapted, *JOINT, *CONTEXT_FORWARD)

    def __init__(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(transformer, *args, **kwargs)
        most = self.transformer.config["pos_embed_max_size"] * self.fold
        if (side := self.image_shape[1]) > most:
            raise ValueError(f"this {self.diffusers_class} knows images of up to {most} latents, not of {side}")

    text_parts = {  # noqa: RUF012
        "text_encoder": "CLIPTextModelWithProjection", "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel", "tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5TokenizerFast",
    }  # fmt: skip
    dispensable = ("text_encoder_3", "tokenizer_3")  # without T5 its tokens are zeros
    tokenizer, most_tokens = "tokenizer_3", T5_TOKENS

    @classmethod
    def encoded(cls, pipe: Any, prompt: str, device: torch.device | str) -> Condition:
        found = pipe.encode_prompt([prompt], None, None, device=device, do_classifier_free_guidance=False)
        return Condition(tokens=found[0], pooled=found[2])

    @classmethod
    def text_sizes(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return CLIP_TOKENS + T5_TOKENS, config["joint_attention_dim"], config["pooled_projection_dim"]

    def _call(self, scaled: Tensor, time: Tensor, cond: Condition) -> Tensor:
        assert cond.tokens is not None
        assert cond.pooled is not None
        return self.transformer(
            hidden_states=scaled, timestep=time, encoder_hidden_states=cond.tokens.to(self.dtype),
            pooled_projections=cond.pooled.to(self.dtype),
        ).sample  # fmt: skip

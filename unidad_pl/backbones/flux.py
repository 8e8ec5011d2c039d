"""FLUX.1 (Black Forest Labs 2024), dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unidad_pl.backbones.transformer import CONTEXT_FORWARD, JOINT, TransformerNetwork, packed, text_first, unpacked
from unidad_pl.condition import Condition

PATCH, TOKENS = 2, 512


class FluxNetwork(TransformerNetwork):
    """A ``FluxTransformer2DModel``. Its pipeline packs latents into tokens; its time goes from 0 to 1; the network of
    FLUX.1-dev takes a guidance scale.

        >>> FluxNetwork.sizes({"in_channels": 64, "num_attention_heads": 24, "attention_head_dim": 128})
        (16, 2, 3072)
    """

    diffusers_class, pipeline = "FluxTransformer2DModel", "FluxPipeline"
    lists = ("transformer_blocks", "single_transformer_blocks")
    adapted = (*TransformerNetwork.adapted, *JOINT, *CONTEXT_FORWARD, "proj_mlp")
    masks, axes = True, ("axes_dims_rope", 3)

    text_parts = {  # noqa: RUF012
        "text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel", "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5TokenizerFast",
    }  # fmt: skip
    tokenizer, most_tokens = "tokenizer_2", TOKENS

    @classmethod
    def encoded(cls, pipe: Any, prompt: str, device: torch.device | str) -> Condition:
        tokens, pooled, _ = pipe.encode_prompt([prompt], None, device=device, max_sequence_length=TOKENS)
        return Condition(tokens=tokens, pooled=pooled)

    @classmethod
    def sizes(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return config["in_channels"] // PATCH**2, PATCH, width

    @classmethod
    def text_sizes(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return TOKENS, config["joint_attention_dim"], config["pooled_projection_dim"]

    def _call(self, scaled: Tensor, time: Tensor, cond: Condition) -> Tensor:
        assert cond.tokens is not None
        assert cond.pooled is not None
        tokens, rows, columns = packed(scaled, PATCH), scaled.shape[2] // PATCH, scaled.shape[3] // PATCH
        places = torch.cartesian_prod(*(torch.arange(n, device=scaled.device) for n in (1, rows, columns)))
        output = self.transformer(
            hidden_states=tokens, timestep=time / self.spec.train_timesteps, guidance=self._guidance_input(scaled),
            pooled_projections=cond.pooled.to(self.dtype), encoder_hidden_states=cond.tokens.to(self.dtype),
            txt_ids=places.new_zeros(cond.tokens.shape[1], 3), img_ids=places,
            joint_attention_kwargs={"attention_mask": text_first(cond.mask, tokens.shape[1])},
        ).sample  # fmt: skip
        return unpacked(output, PATCH, scaled.shape)

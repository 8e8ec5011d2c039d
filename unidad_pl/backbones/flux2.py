"""FLUX.2 (Black Forest Labs 2025), klein among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unidad_pl.backbones.lora import ATTENTION
from unidad_pl.backbones.spec import UNetSpec, shift_of_mu, spec_of_scheduler
from unidad_pl.backbones.transformer import (
    JOINT,
    QWEN3_TEMPLATE,
    QWEN3_TOKENS,
    TransformerNetwork,
    packed,
    text_first,
    unpacked,
)
from unidad_pl.condition import Condition
from unidad_pl.files import read_json, reading
from unidad_pl.schedules import flow_sigmas

MANY_STEPS = 50
"""The pipeline's default, which the table of a network's noise levels is for."""


def mu_of(tokens: int, num_steps: int) -> float:
    """The pipeline's ``mu`` for an image of so many tokens: between lines fitted at 10 and at 200 steps; above 4300
    tokens the latter."""
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return at_200 if tokens > 4300 else at_200 + (at_200 - at_10) / 190 * (num_steps - 200)


@dataclass(frozen=True)
class Flux2Spec(UNetSpec):
    """A flow whose shift depends on the number of steps too.

        >>> [round(sigma, 1) for sigma in Flux2Spec("flow", tokens=4096).own_sigmas(4)]
        [999.0, 29.7, 9.9, 3.3]

    Attributes:
        tokens: of an image.
        shift_type: its scheduler's ``time_shift_type``.
    """

    tokens: int = 4096
    shift_type: str = "exponential"

    def own_sigmas(self, num_steps: int) -> list[float]:
        shift = shift_of_mu(self.shift_type, mu_of(self.tokens, num_steps))
        return flow_sigmas(1 - torch.arange(num_steps) / num_steps, shift).tolist()


class Flux2Network(TransformerNetwork):
    """A ``Flux2Transformer2DModel``. One of its latents is 2 x 2 of the VAE's, normalised; one of them is a token; the
    places of tokens have four axes; its time goes from 0 to 1.

        >>> Flux2Network.text_sizes({"joint_attention_dim": 7680})
        (512, 7680, 0)
    """

    diffusers_class, pipeline, vae = "Flux2Transformer2DModel", "Flux2KleinPipeline", "AutoencoderKLFlux2"
    lists = ("transformer_blocks", "single_transformer_blocks")
    adapted = (
        *ATTENTION, *JOINT, "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out",
        "to_qkv_mlp_proj",
    )  # fmt: skip
    masks, usual_side, usual_guidance, vae_fold = True, 64, 4.0, 2
    axes = ("axes_dims_rope", 4)

    text_parts = {"text_encoder": "Qwen3ForCausalLM", "tokenizer": "Qwen2TokenizerFast"}  # noqa: RUF012
    most_tokens, chats = QWEN3_TOKENS - QWEN3_TEMPLATE, True

    @classmethod
    def encoded(cls, pipe: Any, prompt: str, device: torch.device | str) -> Condition:
        return Condition(tokens=pipe.encode_prompt([prompt], device=device)[0])

    @classmethod
    def sizes(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return config["in_channels"], 1, config["num_attention_heads"] * config["attention_head_dim"]

    @classmethod
    def text_sizes(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return QWEN3_TOKENS, config["joint_attention_dim"], 0

    @classmethod
    def spec_of(cls, scheduler: Path, tokens: int) -> UNetSpec:
        spec, config = spec_of_scheduler(scheduler, tokens), read_json(scheduler, "scheduler config")
        if not config.get("use_dynamic_shifting"):
            return spec
        with reading(scheduler, "scheduler config"):
            kind = config.get("time_shift_type", "exponential")
            many = shift_of_mu(kind, mu_of(tokens, MANY_STEPS))
            return Flux2Spec("flow", shift=many, train_timesteps=spec.train_timesteps, tokens=tokens, shift_type=kind)

    def _call(self, scaled: Tensor, time: Tensor, cond: Condition) -> Tensor:
        assert cond.tokens is not None
        tokens = packed(scaled, 1)
        places = [torch.arange(n, device=scaled.device) for n in (1, *scaled.shape[2:], 1)]
        words = [torch.arange(n, device=scaled.device) for n in (1, 1, 1, cond.tokens.shape[1])]
        output = self.transformer(
            hidden_states=tokens, timestep=time / self.spec.train_timesteps, guidance=self._guidance_input(scaled),
            encoder_hidden_states=cond.tokens.to(self.dtype), txt_ids=torch.cartesian_prod(*words),
            img_ids=torch.cartesian_prod(*places),
            joint_attention_kwargs={"attention_mask": text_first(cond.mask, tokens.shape[1])},
        ).sample  # fmt: skip
        return unpacked(output, 1, scaled.shape)

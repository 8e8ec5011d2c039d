"""Stable Diffusion 3 against diffusers' own class and pipeline."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.backbones.conformance import Conformance
from tests.metrics.toys import refused
from unidad_pl.backbones import LoRA
from unidad_pl.backbones.sd3 import SD3Network
from unidad_pl.condition import Condition


class TestSD3(Conformance):
    network = SD3Network
    config: ClassVar = dict(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
        pos_embed_max_size=6, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    latent_channels = 16
    vae: ClassVar = dict(scaling_factor=1.5305, shift_factor=0.0609)

    def theirs(self, net: Any, scaled: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return net(
            hidden_states=scaled, timestep=t, encoder_hidden_states=cond.tokens, pooled_projections=cond.pooled,
            joint_attention_kwargs=None, return_dict=False,
        )[0]  # fmt: skip

    def test_resolutions(self, folder: Path) -> None:
        assert self.load(folder, resolution=None).image_shape == (16, 8, 8)
        assert self.load(folder, resolution=24).image_shape == (16, 12, 12)
        refused("up to 12 latents, not of 14", self.load, folder, resolution=28)
        refused("multiple of 4 pixels", self.load, folder, resolution=18)

    def test_steps_are_the_schedulers(self, folder: Path) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        found = self.load(folder).own_sigmas(4)
        assert found is not None
        assert [s / (1 + s) for s in found[1:]] == pytest.approx(scheduler.sigmas[1:4].tolist(), rel=1e-4)
        assert found[0] == pytest.approx(999, rel=1e-4)

    def test_adapters_share_the_table_of_positions(self, folder: Path) -> None:
        """A buffer would be in every network and checkpoint: 0.8 GiB each in Stable Diffusion 3.5."""
        network = self.load(folder, lora=LoRA(rank=2))
        twin, name = copy.deepcopy(network), "transformer.pos_embed.pos_embed"
        assert name in network.shared_weights
        assert twin.transformer.pos_embed.pos_embed is network.transformer.pos_embed.pos_embed
        assert not network.transformer.pos_embed.pos_embed.requires_grad
        plain, given = self.load(folder), self.given(network)
        with torch.no_grad():
            torch.testing.assert_close(twin(*given), plain(*given))
        assert name not in dict(plain.named_parameters())

"""FLUX.1 against diffusers' own class and pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from tests.backbones.conformance import Conformance
from tests.metrics.toys import refused
from unidad_pl.backbones.flux import FluxNetwork
from unidad_pl.backbones.spec import spec_of_scheduler
from unidad_pl.condition import Condition


class TestFlux(Conformance):
    """FLUX.1-dev, whose guidance scale is an input."""

    network = FluxNetwork
    config: ClassVar = dict(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    latent_channels = 16
    vae: ClassVar = dict(scaling_factor=0.3611, shift_factor=0.1159)
    guidance: ClassVar[float | None] = 3.5

    def theirs(self, net: Any, scaled: Tensor, t: Tensor, cond: Condition) -> Tensor:
        rows, channels, height, width = scaled.shape
        assert cond.tokens is not None
        answer = net(
            hidden_states=FluxPipeline._pack_latents(scaled, rows, channels, height, width), timestep=t / 1000,
            guidance=None if self.guidance is None else torch.full([1], self.guidance).expand(rows),
            pooled_projections=cond.pooled, encoder_hidden_states=cond.tokens,
            txt_ids=torch.zeros(cond.tokens.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", torch.float32),
            joint_attention_kwargs={}, return_dict=False,
        )[0]  # fmt: skip
        return FluxPipeline._unpack_latents(answer, height * 8, width * 8, 8)

    def test_the_guidance_scale_is_an_input(self, folder: Path) -> None:
        network, low = self.load(folder), self.load(folder, guidance=1.0)
        assert (network.guidance, low.guidance) == (3.5, 1.0)
        given = self.given(network)
        with torch.no_grad():
            assert not torch.allclose(network(*given), low(*given))


class TestSchnell(TestFlux):
    config: ClassVar = TestFlux.config | {"guidance_embeds": False}
    guidance = None

    def test_the_guidance_scale_is_an_input(self, folder: Path) -> None:
        assert self.load(folder).guidance is None
        refused("takes no guidance scale", self.load, folder, guidance=2.0)

    def test_without_a_resolution_images_are_as_large_as_the_pipelines(self, folder: Path) -> None:
        assert self.load(folder, resolution=None).image_shape == (16, 128, 128)


def test_dynamic_shifting_is_the_pipelines(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for kind in ("exponential", "linear"):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, max_shift=1.2)
        scheduler.save_pretrained(tmp_path)
        for tokens in (256, 1024, 4096):
            steps = [1.0, 0.75, 0.5, 0.25]
            scheduler.set_timesteps(sigmas=steps, mu=calculate_shift(tokens, 256, 4096, 0.5, 1.2))
            spec = spec_of_scheduler(tmp_path / "scheduler_config.json", tokens)
            found = spec.own_sigmas(4)
            assert found is not None
            assert [s / (1 + s) for s in found[1:]] == pytest.approx(scheduler.sigmas[1:4].tolist(), rel=1e-4)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    for old, new, message in (
        ('"exponential"', '"cubic"', "time_shift_type must be one of"),
        ('"base_shift": 0.5', '"base_shift": -1', "base_shift"),
        ('"max_image_seq_len": 4096', '"max_image_seq_len": 256', "must differ"),
    ):
        (tmp_path / "scheduler_config.json").write_text(text.replace(old, new))
        refused(message, spec_of_scheduler, tmp_path / "scheduler_config.json", 256)

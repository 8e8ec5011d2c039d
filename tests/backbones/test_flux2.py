"""FLUX.2 against diffusers' own class and pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.backbones.conformance import Conformance
from unidad_pl.backbones.flux2 import Flux2Network
from unidad_pl.condition import Condition

pipelines: Any = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein", reason="needs a newer diffusers")
Pipeline = pipelines.Flux2KleinPipeline


class TestFlux2(Conformance):
    network = Flux2Network
    config: ClassVar = dict(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )  # fmt: skip
    scheduler: ClassVar = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0}
    side = 4

    def theirs(self, net: Any, scaled: Tensor, t: Tensor, cond: Condition) -> Tensor:
        ids = Pipeline._prepare_latent_ids(scaled)
        answer = net(
            hidden_states=Pipeline._pack_latents(scaled), timestep=t / 1000, guidance=None,
            encoder_hidden_states=cond.tokens, txt_ids=Pipeline._prepare_text_ids(cond.tokens), img_ids=ids,
            joint_attention_kwargs=None, return_dict=False,
        )[0]  # fmt: skip
        found: Tensor = Pipeline._unpack_latents_with_ids(answer, ids)
        return found

    @pytest.mark.parametrize(("pixels", "steps"), [(16, 4), (32, 50), (32, 1)])
    def test_steps_are_the_pipelines(self, folder: Path, pixels: int, steps: int) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        network = self.load(folder, resolution=pixels)
        tokens = (pixels // 4) ** 2
        assert network.image_shape == (16, pixels // 4, pixels // 4)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        times = torch.linspace(1.0, 1 / steps, steps).tolist()
        scheduler.set_timesteps(sigmas=times, mu=pipelines.compute_empirical_mu(tokens, steps))
        found = network.own_sigmas(steps)
        assert found is not None
        assert [s / (1 + s) for s in found[1:]] == pytest.approx(scheduler.sigmas[1:-1].tolist(), rel=1e-4)

    @pytest.mark.parametrize(("tokens", "steps"), [(64, 4), (4096, 20), (4301, 4)])
    def test_mu_is_the_pipelines(self, tokens: int, steps: int) -> None:
        from unidad_pl.backbones.flux2 import mu_of

        assert mu_of(tokens, steps) == pytest.approx(pipelines.compute_empirical_mu(tokens, steps), rel=1e-6)

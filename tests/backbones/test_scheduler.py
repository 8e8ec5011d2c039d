"""Folders made by diffusers itself, such as google/ddpm-cat-256: read with their scheduler's betas and prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from tests.metrics.toys import refused
from unidad_pl.backbones import PretrainedUNet
from unidad_pl.backbones.spec import SUPPORTED


def google(**changes: Any) -> UNet2DModel:
    """A small network of the google/ddpm-* family."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        sample_size=16, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, freq_shift=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), attention_head_dim=None,
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), flip_sin_to_cos=False, downsample_padding=0,
    )  # fmt: skip
    return UNet2DModel(**(settings | changes)).eval()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_images_without_noise_are_those_of_the_scheduler(prediction: str, schedule: str, tmp_path: Path) -> None:
    scheduler = DDPMScheduler(500, 2e-4, 0.03, schedule, prediction_type=prediction, clip_sample=False)
    unet = google()
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    denoiser = PretrainedUNet(str(tmp_path)).build()
    torch.testing.assert_close(denoiser.abar, scheduler.alphas_cumprod, rtol=2e-6, atol=0)
    x0 = torch.rand(1, 3, 16, 16) * 2 - 1
    for t in (3, 120, 400):
        abar = scheduler.alphas_cumprod[t].double()
        noisy = scheduler.add_noise(x0, torch.randn_like(x0), torch.tensor([t]))
        with torch.no_grad():
            theirs = scheduler.step(unet(noisy, t).sample, t, noisy).pred_original_sample
            ours = denoiser(noisy / abar.sqrt().float(), ((1 - abar) / abar).sqrt().float().view(1))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_supported_scheduler_has_the_same_betas(name: str, tmp_path: Path) -> None:
    google().save_pretrained(tmp_path)
    betas: dict[str, Any] = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler = getattr(diffusers, name)(num_train_timesteps=200, **betas)
    scheduler.save_pretrained(tmp_path)  # scheduler_config.json beside config.json, as in google's repositories
    denoiser = PretrainedUNet(str(tmp_path)).build()
    torch.testing.assert_close(denoiser.abar, scheduler.alphas_cumprod, rtol=2e-6, atol=0)


@pytest.mark.parametrize("place", [".", "scheduler", "../scheduler"])
def test_where_the_scheduler_lies(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    google().save_pretrained(folder)
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(folder / place)
    assert PretrainedUNet(str(folder)).build().spec.prediction == "v_prediction"


def test_weights_in_a_bin_file(tmp_path: Path) -> None:
    unet = google()
    unet.save_pretrained(tmp_path, safe_serialization=False)
    DDPMScheduler().save_pretrained(tmp_path)
    built = PretrainedUNet(str(tmp_path)).build().unet.state_dict()
    assert all(torch.equal(built[name], value) for name, value in unet.state_dict().items())


@pytest.mark.parametrize(("change", "message"), [
    ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler is not supported; supported are DDPMScheduler"),
    ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "FlowMatchHeunDiscreteScheduler is not supported"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "'use_dynamic_shifting': True"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -1.0}, "shift must be"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not one of linear"),
    ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
])  # fmt: skip
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    google().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "DDPMScheduler"} | change))
    refused(message, PretrainedUNet(str(tmp_path)).build)
    path.write_text("[1")
    refused("is no readable scheduler config", PretrainedUNet(str(tmp_path)).build)

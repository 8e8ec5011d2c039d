"""The text-to-image UNets against diffusers itself: schedule, hooks, guidance; tiny ones saved and loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from tests.metrics.toys import refused
from tests.tiny_sd import BETAS, POOLED, WIDTH, save_unet
from unidad_pl.backbones import StableDiffusion, StableDiffusionUNet
from unidad_pl.backbones.spec import UNetSpec
from unidad_pl.condition import Condition
from unidad_pl.denoiser import guided


@pytest.fixture(params=["1.x", "xl"])
def network(request: pytest.FixtureRequest, tmp_path: Path) -> StableDiffusionUNet:
    return StableDiffusion(str(save_unet(tmp_path / "sd", xl=request.param == "xl"))).build()


def conditions(network: StableDiffusionUNet, count: int) -> Condition:
    pooled = torch.randn(count, network.pooled) if network.pooled else None
    return Condition(tokens=torch.randn(count, 5, network.width), pooled=pooled)


def inputs(network: StableDiffusionUNet) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Two noisy images, their sigmas and conditions."""
    return torch.randn(2, *network.image_shape), torch.tensor([0.3, 9.0]), conditions(network, 2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [0, 499, 999])
def test_x0_is_that_of_diffusers_ddim(tmp_path: Path, prediction: str, t: int) -> None:
    network = StableDiffusion(str(save_unet(tmp_path, prediction=prediction))).build()
    scheduler = DDIMScheduler(prediction_type=prediction, **BETAS)
    scheduler.set_timesteps(1000)
    scaled, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        out = network.unet(scaled, t, encoder_hidden_states=tokens).sample
        want = scheduler.step(out, t, scaled).pred_original_sample
        sigma = network.native_sigmas[t]
        got = network(scaled * (1 + sigma**2).sqrt(), sigma.expand(2), Condition(tokens=tokens))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert len(network.native_sigmas) == 1000


def test_last_sigma_is_stable_diffusions(tmp_path: Path) -> None:
    sigmas = StableDiffusion(str(save_unet(tmp_path))).build().native_sigmas
    assert float(sigmas[-1]) == pytest.approx(14.6146, abs=1e-3)


def test_taps_are_what_hooks_see(network: StableDiffusionUNet) -> None:
    x, sigma, cond = inputs(network)
    seen = {}
    for i, block in enumerate(network.unet.down_blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({f"in{i}": out[0]}))
    network.unet.mid_block.register_forward_hook(lambda _, __, out: seen.update(mid=out))
    with torch.no_grad():
        network(x, sigma, cond)
        hooked = dict(seen)
        taps = network.taps(x, sigma, cond)
        seen.clear()
        assert list(network.taps(x, sigma, cond, ["in0"])) == list(seen) == ["in0"]
    assert list(taps) == list(network.tap_channels) == ["in0", "in1", "mid"]
    for name, tap in taps.items():
        assert torch.equal(tap, hooked[name])
        assert tap.shape[1] == network.tap_channels[name]


def test_sdxl_gets_its_pooled_embedding_and_sizes(tmp_path: Path) -> None:
    folder = save_unet(tmp_path, xl=True)
    x, sigma = torch.randn(2, 4, 16, 16), torch.tensor([1.0, 2.0])
    tokens, pooled = torch.randn(2, 5, WIDTH + POOLED), torch.randn(2, POOLED)
    network = StableDiffusion(str(folder), resolution=32).build()
    assert network.image_shape == (4, 16, 16)
    ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    scale = (1 + sigma**2).rsqrt().view(-1, 1, 1, 1)
    with torch.no_grad():
        eps = network.unet(scale * x, network.time(sigma), encoder_hidden_states=tokens,
                           added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample  # fmt: skip
        cond = Condition(tokens=tokens, pooled=pooled)
        got = network.predict(x, sigma, cond).eps
        small = StableDiffusion(str(folder), resolution=16).build().predict(x, sigma, cond).eps
    assert torch.equal(got, eps)
    assert not torch.allclose(small, eps)


def test_prompts_of_different_lengths_are_guided_as_each_alone(network: StableDiffusionUNet) -> None:
    x, sigma, cond = inputs(network)
    assert cond.tokens is not None
    short = Condition(tokens=torch.randn(1, 3, network.width), pooled=None if cond.pooled is None else cond.pooled[:1])
    with torch.no_grad():
        u, c = network.predict(x, sigma, short.expand(2)), network.predict(x, sigma, cond)
        got = guided(network, x, sigma, cond, short, 3.0)
        alone = network.taps(x, sigma, short.expand(2))
        both = network.taps(torch.cat([x, x]), torch.cat([sigma, sigma]), Condition.cat([short.expand(2), cond]))
    torch.testing.assert_close(got.eps, u.eps + 3.0 * (c.eps - u.eps), atol=1e-5, rtol=1e-4)
    for name, tap in alone.items():
        torch.testing.assert_close(both[name][:2], tap, atol=1e-5, rtol=1e-4)


def test_guidance_is_diffusers_formula(network: StableDiffusionUNet) -> None:
    x, sigma, cond = inputs(network)
    empty = conditions(network, 1)
    with torch.no_grad():
        u, c = network.predict(x, sigma, empty.expand(2)), network.predict(x, sigma, cond)
        got = guided(network, x, sigma, cond, empty, 7.5)
        assert torch.equal(guided(network, x, sigma, cond, empty, 1.0).eps, c.eps)
    torch.testing.assert_close(got.eps, u.eps + 7.5 * (c.eps - u.eps), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.x0 + sigma.view(-1, 1, 1, 1) * got.eps, x, atol=1e-3, rtol=1e-4)
    refused("below 1", guided, network, x, sigma, cond, empty, 0.5)


def test_the_condition_matters_and_must_fit(network: StableDiffusionUNet) -> None:
    x, sigma, cond = inputs(network)
    with torch.no_grad():
        assert not torch.allclose(network(x, sigma, cond), network(x, sigma, cond[torch.tensor([1, 0])]))
    assert cond.tokens is not None
    narrow, pooled = replace(cond, tokens=cond.tokens[..., :5]), torch.zeros(2, network.pooled + 1)
    for wrong in (None, cond[:1], narrow, replace(cond, pooled=pooled), Condition(torch.zeros(2)), torch.zeros(2)):
        refused("need a condition with tokens", network, x, sigma, wrong)


def test_bfloat16_storage_keeps_the_output_layer(network: StableDiffusionUNet) -> None:
    given = inputs(network)
    with torch.no_grad():
        want = network(*given)
        network.to_bfloat16()
        got = network(*given)
    assert network.unet.conv_in.weight.dtype == torch.bfloat16
    assert network.unet.conv_out.weight.dtype == got.dtype == torch.float32
    assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()


def test_gradient_checkpointing_changes_no_gradient(network: StableDiffusionUNet) -> None:
    x, sigma, cond = torch.randn(1, *network.image_shape), torch.tensor([2.0]), conditions(network, 1)
    network.train()
    network(x, sigma, cond).square().mean().backward()
    want = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    network.checkpoint_blocks()
    network(x, sigma, cond).square().mean().backward()
    for p, g in zip(network.parameters(), want, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            torch.testing.assert_close(p.grad, g)


def test_architecture_needs_no_weights(tmp_path: Path) -> None:
    folder = save_unet(tmp_path)
    source = StableDiffusion(str(folder))
    count = sum(p.numel() for p in source.build().parameters())
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert sum(p.numel() for p in source.architecture().parameters()) == count
    refused("diffusion_pytorch_model", source.build, error=OSError)


def test_stable_diffusion_15_has_its_published_size() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_other_pipelines_and_broken_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = StableDiffusion(str(tmp_path))
    refused(r"no model_index\.json", source.build, error=FileNotFoundError)
    save_unet(tmp_path)
    for name in ("StableDiffusion3Pipeline", "FluxPipeline", "LatentConsistencyModelPipeline"):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        refused(name, source.build)
    for broken in ("{", "[]", "{}"):
        (tmp_path / "model_index.json").write_text(broken)
        refused(r"model_index\.json' is no (readable )?pipeline's index", source.build)
    save_unet(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert StableDiffusion(f"~/{tmp_path.name}").build().image_shape == (4, 8, 8)
    refused("resolution must be a multiple of 4 pixels", StableDiffusion(str(tmp_path), resolution=18).build)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".non_ema.safetensors"))
    refused(r"weights are missing in '.*unet'.*only \['.*non_ema.*'\]", source.build, error=FileNotFoundError)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    refused("scheduler_config", source.build, error=FileNotFoundError)


def test_a_model_of_the_hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout as huggingface_hub documents it: refs/main names the commit, snapshots/COMMIT holds the files."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    source, missing = StableDiffusion("owner/tiny"), FileNotFoundError
    refused(r"'owner/tiny'.*hf download OWNER/NAME --local-dir owner/tiny", source.build, error=missing)
    refused(r"'models/sd/no/id'.*hf download", StableDiffusion("models/sd/no/id").build, error=missing)
    repo = cache / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    snapshot = save_unet(repo / "snapshots" / "c0ffee")
    assert torch.equal(source.build().unet.conv_in.weight, StableDiffusion(str(snapshot)).build().unet.conv_in.weight)
    (snapshot / "vae" / "config.json").unlink()
    refused(r"'owner/tiny' has no vae/config\.json: the download is incomplete", source.build, error=missing)


def test_inpainting_and_class_models_are_refused() -> None:
    small: Any = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
                      down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), sample_size=8,
                      up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=10)  # fmt: skip
    for message, own in (
        ("inpainting", {"in_channels": 9}),
        ("class_embed_type", {"class_embed_type": "timestep"}),
        ("guidance scale as an input", {"time_cond_proj_dim": 8}),
    ):
        refused(message, StableDiffusionUNet, UNet2DConditionModel(**small | own), UNetSpec())

"""A UNet2DModel behind the denoiser contract: taps against hooks, predictions against diffusers, strict files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.metrics.toys import refused
from unidad_pl.backbones import NewUNet, PretrainedUNet, UNetDenoiser, UNetSpec
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Parameterization, PredictionType
from unidad_pl.schedules import sigma_from_abar

WEIGHTS = "diffusion_pytorch_model.safetensors"


def small(**changes: Any) -> UNetDenoiser:
    """A small denoiser with attention and weights that make every path count."""
    options: Any = dict(resolution=16, channels=(8, 16), attention_levels=(1,), head_channels=8, patch_size=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = NewUNet(**options | changes).build()
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, std=0.2)
    return denoiser


def one_level(**own: Any) -> UNet2DModel:
    settings: Any = dict(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
    return UNet2DModel(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **settings, **own)


def images(denoiser: UNetDenoiser, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(batch, *denoiser.image_shape, generator=random, dtype=torch.float64).to(dtype)


SIGMA = torch.tensor([0.02, 1.3, 80.0])


def wide(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)


# -- taps ----------------------------------------------------------------------------------------------------------


def hooked(denoiser: UNetDenoiser, x: Tensor, sigma: Tensor, cond: Condition | None) -> list[Tensor]:
    """Outputs of conv_in, of every encoder block (after attention) and of the middle, in a whole forward pass."""
    unet, outputs = denoiser.unet, []
    modules = [unet.conv_in]
    for block in unet.down_blocks:
        modules += list(block.attentions if hasattr(block, "attentions") else block.resnets)
        modules += list(block.downsamplers or [])
    hooks = [m.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for m in [*modules, unet.mid_block]]
    denoiser(x, sigma, cond)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("changes", [
    {}, {"layers": 2, "channels": (8, 16, 24), "attention_levels": (0, 2)}, {"patch_size": 2, "num_classes": 4},
    {"prediction": "epsilon"},
])  # fmt: skip
def test_taps_are_the_encoder_outputs_of_a_whole_pass(changes: dict[str, Any]) -> None:
    denoiser = small(**changes)
    x, cond = images(denoiser), Condition(torch.tensor([0, 3, 1])) if "num_classes" in changes else None
    with torch.no_grad():
        taps, expected = denoiser.taps(x, SIGMA, cond), hooked(denoiser, x, SIGMA, cond)
    assert list(taps) == [*[f"in{i}" for i in range(len(expected) - 1)], "mid"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(taps.values(), expected, strict=True))
    assert denoiser.tap_channels == {name: tap.shape[1] for name, tap in taps.items()}


@pytest.mark.parametrize(
    ("names", "run"), [(["in1", "in0"], 1), (["in2"], 1), (["in3"], 2), (["in5", "in0"], 3), (["mid"], 4)]
)
def test_taps_stop_behind_the_deepest_name(names: list[str], run: int) -> None:
    denoiser, ran = small(channels=(8, 16, 24)), []
    x = images(denoiser)
    for block in [*denoiser.unet.down_blocks, denoiser.unet.mid_block]:
        block.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        some, every = denoiser.taps(x, SIGMA, names=names), denoiser.taps(x, SIGMA)
    assert len(ran) == run + 4
    assert all(torch.equal(some[name], every[name]) for name in names)
    unknown = r"taps \['in9'\] do not exist: this model has in0, .*, mid"
    refused(unknown, denoiser.taps, x, SIGMA, names=["in0", "in9"])


def test_taps_center_the_input_where_the_model_does() -> None:
    denoiser = UNetDenoiser(one_level(sample_size=8, center_input_sample=True), UNetSpec(prediction="sample"))
    x = images(denoiser)
    with torch.no_grad():
        assert torch.equal(denoiser.taps(x, SIGMA)["mid"], hooked(denoiser, x, SIGMA, None)[-1])


# -- predictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", get_args(PredictionType))
def test_x_is_x0_plus_sigma_eps(kind: PredictionType) -> None:
    denoiser = small(prediction=kind).double()
    x, sigma = images(denoiser, dtype=torch.float64), SIGMA.double()
    with torch.no_grad():
        guess = denoiser.predict(x, sigma)
        assert torch.equal(denoiser(x, sigma), guess.x0)
    torch.testing.assert_close(guess.x0 + wide(sigma) * guess.eps, x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_variance_preserving_predictions_against_diffusers(kind: PredictionType) -> None:
    denoiser = small(prediction=kind).double()
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear", prediction_type=kind, clip_sample=False)
    for t in (0, 144, 604, 930, 999):
        sigma = sigma_from_abar(scheduler.alphas_cumprod.double())[t].expand(2)
        x = images(denoiser, 2, torch.float64) * (1 + sigma[0])
        assert denoiser.time(sigma).tolist() == [t, t]
        with torch.no_grad():
            scaled = x * scheduler.alphas_cumprod.double()[t].sqrt()
            out = denoiser.unet(scaled, torch.tensor([t, t])).sample
            theirs = scheduler.step(out, t, scaled).pred_original_sample
            torch.testing.assert_close(denoiser(x, sigma), theirs, rtol=1e-5, atol=1e-5)


def test_edm_prediction_by_its_formula() -> None:
    denoiser = small(prediction="edm", sigma_data=0.7).double()
    x, s = images(denoiser, dtype=torch.float64), wide(SIGMA.double())
    c_skip, c_in = 0.49 / (s**2 + 0.49), 1 / (s**2 + 0.49).sqrt()
    c_out, c_noise = s * 0.7 / (s**2 + 0.49).sqrt(), s.flatten().log() / 4
    with torch.no_grad():
        expected = c_skip * x + c_out * denoiser.unet(c_in * x, 250 * c_noise).sample
        torch.testing.assert_close(denoiser(x, SIGMA.double()), expected, rtol=1e-12, atol=1e-12)


def test_unknown_prediction() -> None:
    refused("'score'", UNetSpec, prediction="score")
    refused("'score'", Parameterization.of, "score", SIGMA, 0.5)


def test_nearest_time_is_the_argmin() -> None:
    denoiser = small(prediction="epsilon")
    sigma = torch.cat([torch.logspace(-3, 2.5, 200), torch.tensor([80.0, 6.324555, 0.5])])
    table, expected = denoiser.abar.tolist(), []
    for s in sigma.double().tolist():
        distances = [abs(1 / (1 + s * s) - abar) for abar in table]
        expected.append(distances.index(min(distances)))
    assert denoiser.double().time(sigma.double()).tolist() == expected
    assert expected[-3:] == [930, 604, 144]


def test_interpolated_time_inverts_sigma() -> None:
    denoiser = small(prediction="epsilon").double()
    denoiser.spec = UNetSpec(prediction="epsilon", timestep="interpolated")
    sigma = sigma_from_abar(denoiser.abar)
    torch.testing.assert_close(denoiser.time(sigma), torch.arange(1000.0).double(), rtol=0, atol=1e-6)
    assert 929 < denoiser.time(torch.tensor([80.0]).double()) < 930
    assert denoiser.time(torch.tensor([1e-3, 1e4]).double()).tolist() == [0, 999]


def test_native_sigmas_are_those_of_the_trained_timesteps() -> None:
    denoiser = small(prediction="epsilon")
    sigmas = denoiser.native_sigmas
    assert (sigmas.diff() > 0).all()
    assert denoiser.double().time(sigmas.double()).tolist() == list(range(1000))
    with pytest.raises(ValueError, match="continuous noise levels"):
        _ = small(prediction="edm").native_sigmas


# -- details of the wrapper ----------------------------------------------------------------------------------------


def test_patches_are_folded_into_channels() -> None:
    denoiser = small(patch_size=2, prediction="sample")
    assert denoiser.image_shape == (3, 16, 16)
    assert denoiser.unet.config["sample_size"] == 8
    x = images(denoiser)
    scaled = x / (1 + wide(SIGMA) ** 2).sqrt()
    folded = torch.stack([scaled[:, c, i::2, j::2] for c in range(3) for i in range(2) for j in range(2)], dim=1)
    with torch.no_grad():
        out = denoiser.unet(folded, denoiser.time(SIGMA)).sample
        x0 = denoiser(x, SIGMA)
    for n in range(12):
        torch.testing.assert_close(x0[:, n // 4, n // 2 % 2 :: 2, n % 2 :: 2], out[:, n])


def test_learned_variance_is_dropped() -> None:
    unet = one_level(sample_size=8, out_channels=6)
    denoiser = UNetDenoiser(unet, UNetSpec(prediction="sample"))
    x = images(denoiser)
    with torch.no_grad():
        out = unet(x / (1 + wide(SIGMA) ** 2).sqrt(), denoiser.time(SIGMA)).sample
        torch.testing.assert_close(denoiser(x, SIGMA), out[:, :3])


def test_misfits_are_named() -> None:
    patches = "patch_size 2: inputs must be a multiple of 4"
    refused(patches, UNetDenoiser, one_level(sample_size=8), UNetSpec(patch_size=2))
    refused("no sample_size", UNetDenoiser, one_level(), UNetSpec())
    refused(r"resolution 20 must be divisible by .* 8", NewUNet, resolution=20, channels=(8, 8, 8), patch_size=2)
    refused(r"attention at level 1 .* head_channels=32", NewUNet, channels=(8, 16))
    refused("'exact'", UNetSpec, timestep="exact")
    refused("sigma_data must be above 0", UNetSpec, sigma_data=0)


def test_class_labels_are_needed_and_used() -> None:
    denoiser = small(num_classes=4)
    assert denoiser.num_classes == 4
    x = images(denoiser, 1).expand(3, -1, -1, -1)
    sigma = torch.full((3,), 1.0)
    for call in (denoiser.predict, denoiser.taps):
        refused("class", call, x, sigma)
        refused("class", call, x, sigma, torch.tensor([0, 0, 1]))
    with torch.no_grad():
        first, same, other = denoiser(x, sigma, Condition(torch.tensor([0, 0, 1])))
    torch.testing.assert_close(first, same)
    assert not torch.allclose(first, other, atol=1e-3)


def test_output_convolution_is_float32_under_bf16_autocast() -> None:
    denoiser = small(prediction="epsilon")
    seen: dict[str, Tensor] = {}
    denoiser.unet.conv_in.register_forward_hook(lambda _m, _i, out: seen.update(first=out))
    denoiser.unet.conv_out.register_forward_hook(lambda _m, i, out: seen.update(input=i[0], output=out))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        guess = denoiser.predict(images(denoiser), SIGMA)
    conv = denoiser.unet.conv_out
    assert seen["first"].dtype == torch.bfloat16
    assert seen["output"].dtype == guess.x0.dtype == guess.eps.dtype == torch.float32
    assert torch.equal(seen["output"], F.conv2d(seen["input"].float(), conv.weight, conv.bias, padding=1))


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small(patch_size=2, sigma_data=0.6).save_pretrained(tmp_path)
    return tmp_path


def test_save_and_load_give_the_same_denoiser(folder: Path) -> None:
    original, loaded = small(patch_size=2, sigma_data=0.6), PretrainedUNet(str(folder)).build()
    assert loaded.spec == original.spec
    assert not loaded.training
    expected = original.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(images(original), SIGMA), original(images(original), SIGMA))


def test_save_in_half_precision_leaves_the_model_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    denoiser = small()
    denoiser.save_pretrained(tmp_path, dtype=torch.float16)
    assert not caplog.messages  # diffusers warns of modules to be kept in float32, of which there are none
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}
    assert {p.dtype for p in PretrainedUNet(str(tmp_path)).build().parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "error", "message"), [
    ("config.json", FileNotFoundError, r"has no config\.json"), (WEIGHTS, OSError, WEIGHTS),
    ("denoiser.json", FileNotFoundError, "neither scheduler_config.json"),
])  # fmt: skip
def test_missing_file_is_named(folder: Path, name: str, error: type, message: str) -> None:
    (folder / name).unlink()
    refused(message, PretrainedUNet(str(folder)).build, error=error)


def test_unknown_entry_is_named(folder: Path) -> None:
    entries = json.loads((folder / "denoiser.json").read_text())
    (folder / "denoiser.json").write_text(json.dumps(entries | {"sigma_dta": 1}))
    refused(r"unknown entries \['sigma_dta'\]", PretrainedUNet(str(folder)).build)


@pytest.mark.parametrize(("name", "size"), [("bias", None), ("scale", 1), ("bias", 5)])
def test_weights_that_do_not_fit_are_named(folder: Path, name: str, size: int | None) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop(f"conv_out.{name}", None)
    if size is not None:
        weights[f"conv_out.{name}"] = torch.ones(size)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    wrong = (ValueError, RuntimeError)
    refused(r"conv_out\.(bias|scale)", PretrainedUNet(str(folder)).build, error=wrong)

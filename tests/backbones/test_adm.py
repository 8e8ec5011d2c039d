"""guided-diffusion weights in a UNet2DModel: the recorded outputs of the original network, exact inverses, errors."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from tests.metrics.toys import refused
from unidad_pl.backbones import ADMConfig, ADMSource, ADMStateDictAdapter
from unidad_pl.backbones.adm import adm_denoiser
from unidad_pl.backbones.adm_config import unet2d_config
from unidad_pl.backbones.weights import read_weights
from unidad_pl.condition import Condition

FOLDER = Path(__file__).parents[1] / "fixtures" / "adm_tiny"
CHECKPOINT, CONFIG = FOLDER / "adm_tiny.pt", FOLDER / "config.json"
TINY = ADMConfig.load(CONFIG)
IO = torch.load(FOLDER / "io.pt", weights_only=True)

VARIANTS = {
    "tiny": TINY,
    "new attention order, classes": replace(TINY, use_new_attention_order=True, class_cond=True, num_classes=5),
    "convolutions change the resolution": replace(TINY, resblock_updown=False, num_res_blocks=2),
    "added time embedding, no variance": replace(TINY, use_scale_shift_norm=False, learn_sigma=False),
    "attention everywhere": replace(TINY, attention_resolutions="32,16,8", num_head_channels=32),
    "no attention but in the middle": replace(TINY, attention_resolutions="", channel_mult="1,2"),
}


def shapes(adm: ADMConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in UNet2DModel(**unet2d_config(adm)).state_dict().items()}


def random_state(adm: ADMConfig) -> dict[str, Tensor]:
    """Random weights under UNet2DModel names."""
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes(adm).items()}


# -- the original network ------------------------------------------------------------------------------------------


def test_outputs_are_those_of_the_original_network() -> None:
    denoiser = ADMSource(str(CHECKPOINT), str(CONFIG)).build()
    assert not denoiser.training
    with torch.no_grad():
        single = denoiser.unet(IO["x"], IO["t"]).sample
        double = denoiser.double().unet(IO["x"].double(), IO["t"]).sample
    torch.testing.assert_close(single, IO["expected"], rtol=0, atol=2e-5)
    torch.testing.assert_close(double, IO["expected"].double(), rtol=1e-7, atol=2e-7)  # recorded as float32


def test_taps_are_those_of_the_original_network() -> None:
    denoiser = ADMSource(str(CHECKPOINT), TINY).build()
    i = int(IO["tap_index"])
    abar = denoiser.abar[IO["t"][i]].double()
    sigma = ((1 - abar) / abar).sqrt().float()[None]
    assert denoiser.time(sigma).item() == IO["t"][i]
    with torch.no_grad():
        taps = denoiser.taps(IO["x"][i : i + 1] * (1 + sigma**2).sqrt(), sigma)
    assert list(taps) == list(IO["taps"]) == list(denoiser.tap_channels)
    for name, expected in IO["taps"].items():
        assert (taps[name] - expected).norm() / expected.norm() < 5e-6, name
        assert denoiser.tap_channels[name] == expected.shape[1]


def test_denoiser_reads_the_network_as_epsilon() -> None:
    denoiser = adm_denoiser(TINY, read_weights(CHECKPOINT)).double()
    sigma = torch.tensor([0.02, 0.7, 3.0, 20.0, 80.0], dtype=torch.float64)
    x = IO["x"].double() * sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        eps = denoiser.unet(x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt(), denoiser.time(sigma)).sample[:, :3]
        torch.testing.assert_close(denoiser(x, sigma), x - sigma.view(-1, 1, 1, 1) * eps, rtol=1e-12, atol=1e-12)
    assert denoiser.image_shape == (3, 32, 32)


# -- names and shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adm", VARIANTS.values(), ids=VARIANTS)
def test_round_trip_is_bit_identical(adm: ADMConfig) -> None:
    adapter, theirs = ADMStateDictAdapter(adm), random_state(adm)
    ours = adapter.from_diffusers(theirs)
    back = adapter.to_diffusers(ours)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], value) for name, value in theirs.items())
    again = adapter.from_diffusers(back)
    assert list(again) == list(ours)
    assert all(torch.equal(again[name], value) for name, value in ours.items())
    storages = {value.untyped_storage().data_ptr() for value in back.values()}
    assert len(storages) == len(back)  # no two parameters share memory


def test_round_trip_of_the_checkpoint() -> None:
    adapter, state = ADMStateDictAdapter(TINY), read_weights(CHECKPOINT)
    back = adapter.from_diffusers(adapter.to_diffusers(state))
    assert set(back) == set(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize("new_order", [False, True])
def test_rows_of_qkv(new_order: bool) -> None:
    """Row by row, as the two attention modules of guided-diffusion read them."""
    adapter = ADMStateDictAdapter(replace(TINY, use_new_attention_order=new_order))
    name, width, head = "input_blocks.3.1.qkv.bias", 64, 16
    mapped = adapter.to_diffusers(read_weights(CHECKPOINT) | {name: torch.arange(3.0 * width)})
    for part, letter in enumerate("qkv"):
        for row in range(width):
            h, c = divmod(row, head)
            expected = part * width + row if new_order else h * 3 * head + part * head + c
            assert mapped[f"down_blocks.1.attentions.0.to_{letter}.bias"][row] == expected


def test_ffhq256_is_the_known_network() -> None:
    adm = ADMConfig.load("ffhq256")
    theirs = shapes(adm)
    assert sum(shape.numel() for shape in theirs.values()) == 552_814_086
    ours = ADMStateDictAdapter(adm).from_diffusers({k: torch.empty(s, device="meta") for k, s in theirs.items()})
    assert (len(ours), len(theirs)) == (566, 630)
    assert sum(value.numel() for value in ours.values()) == 552_814_086
    known = {
        "time_embed.0.weight": (1024, 256),
        "input_blocks.3.0.in_layers.2.weight": (256, 256, 3, 3),  # a downsampling residual block
        "input_blocks.7.0.skip_connection.weight": (512, 256, 1, 1),
        "input_blocks.10.1.qkv.weight": (1536, 512, 1),
        "input_blocks.17.1.proj_out.weight": (1024, 1024, 1),
        "middle_block.1.qkv.bias": (3072,),
        "output_blocks.2.2.in_layers.2.weight": (1024, 1024, 3, 3),  # upsampling after an attention layer
        "output_blocks.11.1.out_layers.3.weight": (512, 512, 3, 3),  # upsampling without one
        "output_blocks.17.0.skip_connection.weight": (256, 512, 1, 1),
        "out.2.weight": (6, 256, 3, 3),
    }
    assert {name: tuple(ours[name].shape) for name in known} == known


def test_ffhq256_constructor_arguments() -> None:
    config = unet2d_config(ADMConfig.load("ffhq256"))
    assert config["block_out_channels"] == (256, 256, 512, 512, 1024, 1024)
    assert config["down_block_types"] == ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3
    assert config["up_block_types"] == ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3
    assert (config["out_channels"], config["attention_head_dim"], config["attn_norm_num_groups"]) == (6, 64, 32)


@pytest.mark.parametrize("adm", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_runs(adm: ADMConfig) -> None:
    denoiser = adm_denoiser(adm, ADMStateDictAdapter(adm).from_diffusers(random_state(adm)))
    cond = Condition(torch.tensor([1, 4])) if adm.class_cond else None
    x, sigma = torch.zeros(2, *denoiser.image_shape), torch.tensor([0.5, 80.0])
    with torch.no_grad():
        assert denoiser(x, sigma, cond).shape == x.shape
        taps = denoiser.taps(x, sigma, cond)
    assert {name: tap.shape[1] for name, tap in taps.items()} == denoiser.tap_channels


def test_channels_and_dropout_follow_the_flags() -> None:
    config = unet2d_config(replace(TINY, in_channels=1, dropout=0.25))
    assert (config["in_channels"], config["out_channels"], config["dropout"]) == (1, 2, 0.25)
    assert unet2d_config(replace(TINY, learn_sigma=False))["out_channels"] == 3


def test_spec_follows_the_flags() -> None:
    assert TINY.spec.train_timesteps == 1000
    short = replace(TINY, diffusion_steps=250, predict_xstart=True).spec
    assert (short.train_timesteps, short.prediction) == (250, "sample")
    assert (short.beta_start, short.beta_end) == pytest.approx((4e-4, 0.08))
    assert replace(TINY, channel_mult="", image_size=128).widths == (32, 32, 64, 96, 128)


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["ema", "model", "state_dict"])
def test_wrapped_checkpoint_is_taken_out_and_reported(wrapper: str, tmp_path: Path, caplog: Any) -> None:
    state = {key: value.half() for key, value in read_weights(CHECKPOINT).items()}
    torch.save({wrapper: state, "step": 3}, tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING):
        denoiser = ADMSource(str(tmp_path / "w.pt"), str(CONFIG)).build()
    assert f"entry '{wrapper}'" in caplog.text
    assert "step" in caplog.text
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}
    assert torch.equal(denoiser.unet.conv_in.weight, state["input_blocks.0.0.weight"].float())


def test_safetensors_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(read_weights(CHECKPOINT), tmp_path / "w.safetensors")
    ours = ADMSource(str(tmp_path / "w.safetensors"), str(CONFIG)).build().state_dict()
    expected = ADMSource(str(CHECKPOINT), str(CONFIG)).build().state_dict()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_missing_unexpected_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    adapter, state, extra = ADMStateDictAdapter(TINY), read_weights(CHECKPOINT), {"head.weight": torch.zeros(3)}
    some = {name: value for name, value in state.items() if name != "out.2.bias"} | extra
    refused(r"1 keys missing \[out.2.bias\], 1 unexpected \[head.weight\]", adapter.to_diffusers, some)
    theirs = {name: value for name, value in random_state(TINY).items() if name != "conv_out.bias"} | extra
    message = r"UNet2DModel weights.*\[conv_out.bias\], 1 unexpected \[head.weight\]"
    refused(message, adapter.from_diffusers, theirs)
    torch.save(state | {"out.2.bias": torch.zeros(3)}, tmp_path / "w.pt")
    source = ADMSource(str(tmp_path / "w.pt"), str(CONFIG))
    refused(r"1 wrong shapes \[out.2.bias has \(3,\) instead of \(6,\)\]", source.build)
    message = r"middle_block.1.qkv.bias has 40 rows, not a multiple of .* = 48"
    refused(message, adapter.to_diffusers, state | {"middle_block.1.qkv.bias": torch.ones(40)})


def test_unreadable_checkpoints_are_named(tmp_path: Path) -> None:
    refused(r"nowhere.pt", read_weights, tmp_path / "nowhere.pt", error=FileNotFoundError)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    torch.save({"step": 3}, tmp_path / "other.pt")
    for name in ("text.pt", "text.safetensors", "other.pt"):
        refused(name, read_weights, tmp_path / name)


@pytest.mark.parametrize(("change", "message"), [
    ({"channel_mult": "0.5,1"}, "channel_mult must start with 1, got '0.5'"),
    ({"channel_mult": "", "image_size": 512}, "channel_mult must start with 1"),
    ({"channel_mult": "", "image_size": 48}, "no default for image_size 48"),
    ({"num_head_channels": -1}, "fixed num_heads"),
    ({"num_head_channels": 24}, "24 does not divide"),
    ({"noise_schedule": "sqrt"}, "'linear' or 'cosine', got 'sqrt'"),
    ({"diffusion_steps": 500, "rescale_timesteps": True}, "got 500"),
    ({"sr_size": 64}, r"unknown guided-diffusion flags \['sr_size'\]"),
])  # fmt: skip
def test_unsupported_flags_are_named(change: dict[str, Any], message: str) -> None:
    refused(message, ADMConfig.from_flags, asdict(TINY) | change)


def test_config_files(tmp_path: Path) -> None:
    assert ADMConfig.from_flags(json.loads(CONFIG.read_text())) == TINY
    assert ADMConfig.from_flags(asdict(TINY) | {"num_heads": 7, "use_fp16": True}) == TINY
    nowhere = ADMSource(str(CHECKPOINT), "ffhq512")
    refused("'ffhq512' is neither a file nor a preset", nowhere.build, error=FileNotFoundError)
    for content, message in (("[1]", "must be a JSON object"), ("{", r"wrong\.json.*JSONDecodeError")):
        (tmp_path / "wrong.json").write_text(content)
        refused(message, ADMConfig.load, tmp_path / "wrong.json")

"""Folders as others lay them out: precisions, parts, old names, Hugging Face's cache, unusual networks."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from tests.backbones.test_adm import CHECKPOINT, CONFIG, TINY
from tests.backbones.test_damaged import run, use
from tests.metrics.toys import refused
from tests.tiny_sd import in_parts, save_ddpm, save_tiny
from unidad_pl.backbones import ADMConfig, ADMSource, LoRA, NewUNet, PretrainedUNet, StableDiffusion, UNetSpec
from unidad_pl.condition import Condition

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture
def ddpm(tmp_path: Path) -> Path:
    save_ddpm(tmp_path / "ddpm")
    return tmp_path / "ddpm"


def same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    built = PretrainedUNet(str(folder)).build().unet
    assert {value.dtype for value in built.state_dict().values()} == {torch.float32}
    assert all(torch.equal(value, expected[name].float()) for name, value in built.state_dict().items())


@pytest.mark.parametrize("name", ["fp16.safetensors", "bf16.safetensors", "bin", "fp16.bin"])
def test_weights_of_any_precision_and_kind(ddpm: Path, name: str) -> None:
    path = ddpm / "unet" / f"{WEIGHTS}.safetensors"
    half = {key: value.half() for key, value in load_file(path).items()}
    path.unlink()
    target = ddpm / "unet" / f"{WEIGHTS}.{name}"
    torch.save(half, target) if name.endswith("bin") else save_file(half, target)
    same(ddpm, half)


@pytest.mark.parametrize("index", [f"{WEIGHTS}.safetensors.index.json", f"{WEIGHTS}.safetensors.index.fp16.json"])
def test_weights_in_parts(ddpm: Path, index: str) -> None:
    folder = ddpm / "unet"
    state = in_parts(folder, index, "part-{}.safetensors")
    same(ddpm, state)
    (folder / "part-1.safetensors").rename(ddpm / "part-1.safetensors")
    refused(r"part-1\.safetensors", PretrainedUNet(str(ddpm)).build, error=FileNotFoundError)
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(state, "../part-1.safetensors")}))
    refused(r"index.*names the file '\.\./part-1", PretrainedUNet(str(ddpm)).build)


def test_parts_that_diffusers_itself_writes(ddpm: Path) -> None:
    unet = UNet2DModel.from_pretrained(ddpm / "unet")
    (ddpm / "unet" / f"{WEIGHTS}.safetensors").unlink()
    unet.save_pretrained(ddpm / "unet", max_shard_size="10KB")
    assert len(list((ddpm / "unet").glob("*.safetensors"))) > 1
    same(ddpm, unet.state_dict())


def test_attention_layers_under_their_old_names(ddpm: Path) -> None:
    """As in google/ddpm-celebahq-256; read as diffusers itself reads them."""
    path = ddpm / "unet" / f"{WEIGHTS}.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state, renamed = load_file(path), {}
    for name, value in state.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")  # noqa: PLW2901
        renamed[name] = value
    assert set(renamed) != set(state)
    save_file(renamed, path)
    same(ddpm, UNet2DModel.from_pretrained(ddpm / "unet", low_cpu_mem_usage=False).state_dict())


def test_a_pixel_model_of_the_hugging_face_cache(ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout as huggingface_hub documents it: files are links into blobs/."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    source = PretrainedUNet("google/ddpm-celebahq-256")
    refused(r"'google/ddpm-celebahq-256'.*'hf download OWNER/NAME'", source.build, error=FileNotFoundError)
    repo = tmp_path / "cache" / "models--google--ddpm-celebahq-256"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(ddpm.rglob("*.*"))):
        if file.is_file():
            place = repo / "snapshots" / "c0ffee" / file.relative_to(ddpm)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, repo / "blobs" / str(number))
            place.symlink_to(repo / "blobs" / str(number))
    run(source)


def test_paths_below_the_home_folder(ddpm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(ddpm.parent))
    run(PretrainedUNet("~/ddpm"))
    shutil.copy(CHECKPOINT, ddpm / "adm.pt")
    shutil.copy(CONFIG, ddpm / "adm.json")
    run(ADMSource("~/ddpm/adm.pt", "~/ddpm/adm.json"))


@pytest.mark.parametrize("precision", ["fp16", ""])
def test_a_pipeline_in_half_precision_and_torch_files(tmp_path: Path, precision: str) -> None:
    folder = save_tiny(tmp_path / "sd")
    for part, stem in (("unet", WEIGHTS), ("vae", WEIGHTS), ("text_encoder", "model")):
        path = folder / part / f"{stem}.safetensors"
        half = {name: value.half() for name, value in load_file(path).items()}
        path.unlink()
        if precision:
            save_file(half, folder / part / f"{stem}.{precision}.safetensors")
        else:
            torch.save(half, folder / part / f"{'pytorch_model' if stem == 'model' else stem}.bin")
    use(folder)
    assert next(StableDiffusion(str(folder)).codec().parts.text_encoder.parameters()).dtype == torch.float32  # type: ignore[attr-defined]


@pytest.mark.parametrize("own", [
    {"in_channels": 1, "out_channels": 1}, {"mid_block_type": None}, {"num_class_embeds": 10},
    {"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "block_out_channels": (32, 32),
     "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "norm_num_groups": 8},
])  # fmt: skip
def test_networks_of_other_kinds_equal_diffusers(tmp_path: Path, own: dict[str, Any]) -> None:
    """One channel (MNIST), no middle block, NCSN++ blocks: outputs of the network, and taps of every block."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet = UNet2DModel(**settings | own).eval()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    run(PretrainedUNet(str(tmp_path)))
    denoiser = PretrainedUNet(str(tmp_path)).build()
    x, t = torch.randn(2, *denoiser.image_shape), torch.tensor([20, 700])
    labels = torch.tensor([1, 2]) if "num_class_embeds" in own else None
    cond = None if labels is None else Condition(labels)
    seen: list[torch.Tensor] = []
    for block in denoiser.unet.down_blocks:
        block.register_forward_hook(lambda _, __, out: seen.extend(out[1]))
    sigma = denoiser.native_sigmas[t]
    with torch.no_grad():
        taps = denoiser.taps(x * (1 + sigma**2).sqrt().view(-1, 1, 1, 1), sigma, cond)
        expected, hooked = unet(x, t, class_labels=labels).sample, list(seen)
        seen.clear()
        ours = denoiser.predict(x * (1 + sigma**2).sqrt().view(-1, 1, 1, 1), sigma, cond).eps
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert ("mid" in taps) == (own.get("mid_block_type", "") is not None)
    assert all(torch.equal(tap, hook) for tap, hook in zip(list(taps.values())[1:], hooked, strict=False))


def test_flags_as_guided_diffusion_writes_them(tmp_path: Path) -> None:
    text = {name: str(value) for name, value in asdict(TINY).items()}
    assert ADMConfig.from_flags(text) == TINY
    lists = {"channel_mult": [1, 2], "attention_resolutions": [16, 8]}
    expected = {"channel_mult": "1,2", "attention_resolutions": "16,8"}
    assert ADMConfig.from_flags(asdict(TINY) | lists) == ADMConfig(**asdict(TINY) | expected)
    (tmp_path / "flags.json").write_text(json.dumps(text))
    run(ADMSource(str(CHECKPOINT), str(tmp_path / "flags.json")))
    for name, value in (("learn_sigma", "maybe"), ("image_size", "big"), ("channel_mult", "1,x"), ("dropout", "nan")):
        refused(name, ADMConfig.from_flags, text | {name: value})


BAD = (float("nan"), float("inf"), -float("inf"), -1, 0, 1e30, "text", None, 2.5, 10**12)
"""What a numeric option may be by mistake."""
NUMBERS: list[tuple[Any, dict[str, Any], str]] = [
    (NewUNet, {}, "resolution layers head_channels norm_groups image_channels num_classes dropout sigma_data "
     "patch_size"),
    (UNetSpec, {}, "sigma_data patch_size beta_start beta_end train_timesteps"), (LoRA, {}, "rank alpha"),
    (ADMConfig, {"num_head_channels": 64}, "image_size num_channels num_res_blocks num_head_channels num_classes "
     "dropout in_channels diffusion_steps"), (StableDiffusion, {"path": "x"}, "resolution"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "names"), NUMBERS)
def test_numbers_that_make_no_sense_name_their_option(kind: Any, given: dict[str, Any], names: str) -> None:
    refusals = 0
    for name in names.split():
        for value in BAD:
            try:
                kind(**given | {name: value})
            except ValueError as error:
                assert name in str(error), f"{name}={value!r}: {error}"  # noqa: PT017
                refusals += 1
    assert refusals >= 7 * len(names.split())

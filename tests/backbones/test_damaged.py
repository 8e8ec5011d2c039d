"""Damaged and foreign model files: refused with one sentence that names the file, or they work; nothing else."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backbones.damage import HTML, POINTER, json_files, outcome, tensor_files, whole_files
from tests.backbones.test_adm import CHECKPOINT, CONFIG
from tests.metrics.toys import refused
from tests.tiny_sd import save_ddpm, save_tiny
from unidad_pl.backbones import ADMSource, PretrainedUNet, StableDiffusion
from unidad_pl.backbones.weights import read_plain, read_weights
from unidad_pl.files import BrokenFile

CASES = 5
"""Damages of each file that are tried here, of some hundred that :mod:`tests.backbones.damage` makes."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("sd") / "sd")
    shutil.rmtree(folder / "vocabulary")
    return folder


@pytest.fixture
def sd(pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline, tmp_path / "sd"))


@pytest.fixture
def ddpm(tmp_path: Path) -> Path:
    save_ddpm(tmp_path / "ddpm")
    return tmp_path / "ddpm"


def use(folder: Path) -> None:
    """Everything a run asks of a text-to-image model."""
    source = StableDiffusion(str(folder))
    network = source.build()
    x, cond = torch.zeros(1, *network.image_shape), network.blank_condition(1)
    assert network.taps(x, torch.ones(1), cond).keys() == network.tap_channels.keys()
    assert network(x, torch.ones(1), cond).shape == x.shape
    codec = source.codec()
    codec.embed(["a dog"])
    codec.decode(codec.encode(torch.zeros(1, 3, 16, 16)))


def run(source: Any) -> None:
    network = source.build()
    cond = network.blank_condition(1)
    x = torch.zeros(1, *network.image_shape)
    taps = network.taps(x, torch.ones(1), cond)
    assert {name: tap.shape[1] for name, tap in taps.items()} == network.tap_channels
    assert network(x, torch.ones(1), cond).shape == x.shape


def survive(build: Callable[[], Any], file: Path, seed: int) -> None:
    data = file.read_bytes()
    cases = list(whole_files(data, seed))
    if file.suffix == ".json" and file.name != "tokenizer.json":
        cases += list(json_files(data))
    if file.suffix == ".safetensors":
        cases += list(tensor_files(data, seed))
    step = max(1, len(cases) // CASES)
    for done, content in cases[seed % step :: step][:CASES]:
        file.write_bytes(content)
        seen = outcome(build, file)
        assert seen in ("works", "refused"), f"{file.name}, {done}: {seen}"
    file.write_bytes(data)
    build()


@pytest.mark.parametrize("name", [
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json",
])  # fmt: skip
def test_damaged_unets(ddpm: Path, name: str) -> None:
    survive(lambda: run(PretrainedUNet(str(ddpm))), ddpm / name, seed=len(name))


@pytest.mark.parametrize("name", ["adm.pt", "adm.json"])
def test_damaged_guided_diffusion_checkpoints(tmp_path: Path, name: str) -> None:
    shutil.copy(CHECKPOINT, tmp_path / "adm.pt")
    shutil.copy(CONFIG, tmp_path / "adm.json")
    survive(lambda: run(ADMSource(str(tmp_path / "adm.pt"), str(tmp_path / "adm.json"))), tmp_path / name, seed=3)


@pytest.mark.parametrize("name", [
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json", "text_encoder/model.safetensors", "scheduler/scheduler_config.json",
])  # fmt: skip
def test_damaged_pipelines(sd: Path, name: str) -> None:
    survive(lambda: use(sd), sd / name, seed=len(name))


@pytest.mark.parametrize(("content", "message"), [
    (HTML, "is an HTML page .* download it again"), (POINTER, "is a Git LFS pointer .* 'git lfs pull'"),
    (b"", "is empty"),
])  # fmt: skip
def test_what_a_failed_download_leaves_is_called_by_its_name(sd: Path, content: bytes, message: str) -> None:
    files = sorted(file for file in sd.rglob("*") if file.is_file())
    if content != HTML:  # every file is looked at in the same way; one of each kind for the other ways to fail
        files = list({file.suffix: file for file in files}.values())
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(content)
        refused(rf"{file.name}'.* {message}", use, sd, error=BrokenFile)
        file.write_bytes(whole)
    for name in ("w.pt", "w.bin", "w.safetensors"):
        (sd / name).write_bytes(content)
        refused(rf"{name}'.* {message}", read_weights, sd / name, error=BrokenFile)


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploded",)


def archive(content: bytes, deflated: bool = False) -> bytes:
    """What looks like torch's zip around a pickle."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as file:
        file.writestr("a/data.pkl", content)
        file.writestr("a/version", "3\n")
        file.writestr("a/byteorder", "little")
    return written.getvalue()


def tar(folder: Path) -> bytes:
    with tarfile.open(folder / "old.tar", "w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            (folder / name).write_bytes(pickle.dumps({}))
            file.add(folder / name, name)
    return (folder / "old.tar").read_bytes()


def scripted(folder: Path) -> bytes:
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(folder / "script.pt"))
    return (folder / "script.pt").read_bytes()


def deep(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


@pytest.mark.parametrize("make", [
    *(lambda _, p=p: pickle.dumps(Code(), protocol=p) for p in range(6)),
    *(lambda _, p=p: pickle.dumps({"a": [1, 2.5, "b"]}, protocol=p)[:-3] for p in range(6)),
    lambda _: archive(pickle.dumps(Code(), protocol=2)), lambda _: archive(b"\x80\x02"), lambda _: archive(b""),
    lambda _: archive(pickle.dumps({"a": b"0" * 10**6}, protocol=2), deflated=True),
    lambda _: archive(b"\x80\x02cbuiltins\nbytearray\n\x8a\x08\xff\xff\xff\xff\xff\xff\x00\x00\x85R."),
    tar, scripted, lambda _: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.", lambda _: b"PK\x03\x04" + b"\0" * 100,
    lambda _: archive(pickle.dumps({"a": 1}, protocol=2))[:-30], lambda _: deep(100)[:50], lambda _: b"\xfd7zXZ\0" * 9,
    lambda _: b"\x1f\x8b\x08" + b"\0" * 50, lambda _: b"\x80\x02h\x05.", lambda _: b"\x80\x02(t0000.", lambda _: b"0",
])  # fmt: skip
def test_no_torch_file_ends_in_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(make(tmp_path))
    for read in (read_weights, lambda path: read_plain(path, str(path))):
        with pytest.raises(BrokenFile, match=r"w\.pt") as raised:
            read(tmp_path / "w.pt")
        assert "weights_only" not in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "exploded").exists()


def test_plain_data_that_is_no_weights(tmp_path: Path) -> None:
    path, one = tmp_path / "w.pt", torch.ones(1)
    for content in (3, [one], {}, {"a": 1}, {1: one}, {"a": one.to_sparse()}, {"model": {"a": "b"}}):
        torch.save(content, path)
        refused(r"w\.pt' holds no weights", read_weights, path, error=BrokenFile)
    for content in (deep(10_000), archive(deep(10_000))):
        path.write_bytes(content)
        refused(r"w\.pt'", read_weights, path, error=BrokenFile)
    torch.save({"a": one.expand(10**6, 10**6)}, path)
    refused("holds less than the numbers of its tensor 'a'", read_weights, path, error=BrokenFile)


@pytest.mark.parametrize(("change", "message"), [
    ({"layers_per_block": 10**5}, "blocks"), ({"layers_per_block": 10**7}, "layers_per_block"),
    ({"block_out_channels": [10**9, 8]}, "block_out_channels"),
    ({"block_out_channels": [8] * 10**5}, "blocks"), ({"sample_size": 10**12}, "sample_size"),
    ({"in_channels": -3}, "in_channels"), ({"norm_eps": float("nan")}, "norm_eps"),
    ({"norm_eps": None}, "norm_eps"), ({"freq_shift": None}, "freq_shift"), ({"act_fn": None}, "act_fn"),
    ({"dropout": "0.1"}, "dropout"),
    ({"_class_name": "os.system"}, "os.system"), ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
    ({"down_block_types": ["os.system", "DownBlock2D"]}, "os.system"), ({"mid_block_type": "os.system"}, "os.system"),
    ({"num_class_embeds": 10**12}, "num_class_embeds"), ({"flip_sin_to_cos": "False"}, "flip_sin_to_cos"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'"), ({"freq_shift": 4}, "freq_shift"),
    ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"), ({"attention_head_dim": 0}, "ZeroDivisionError"),
])  # fmt: skip
def test_configs_that_no_network_has_are_refused_before_anything_is_built(
    ddpm: Path, change: dict[str, Any], message: str
) -> None:
    path = ddpm / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for build in (PretrainedUNet(str(ddpm)).build, PretrainedUNet(str(ddpm)).architecture):
        refused(rf"unet/config\.json' is no readable .*{message}", build, error=BrokenFile)


@pytest.mark.parametrize("change", [
    {"norm_num_groups": 0}, {"act_fn": "x"}, {"up_block_types": []}, {"sample_size": None}, {"attention_head_dim": 0},
])  # fmt: skip
def test_a_text_to_images_config_is_looked_at_before_its_size_is_asked_for(sd: Path, change: dict[str, Any]) -> None:
    path = sd / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for build in (StableDiffusion(str(sd)).build, StableDiffusion(str(sd)).architecture):
        refused(r"unet/config\.json' is no readable config of a UNet2DConditionModel", build, error=BrokenFile)


@pytest.mark.parametrize("change", [
    {"num_train_timesteps": 10**12}, {"num_train_timesteps": "1000"}, {"num_train_timesteps": 0}, {"beta_end": -1},
    {"beta_start": float("nan")}, {"beta_start": None}, {"beta_end": 2.0}, {"beta_start": 0.9, "beta_end": 0.95},
    {"_class_name": "os.system"}, {"_class_name": ["DDPMScheduler"]}, {"beta_schedule": {}}, {"prediction_type": 3},
    {"beta_start": 0.02, "beta_end": 0.01},
])  # fmt: skip
def test_schedulers_without_noise_levels(ddpm: Path, change: dict[str, Any]) -> None:
    path = ddpm / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(r"(scheduler_config|unet/config)\.json", PretrainedUNet(str(ddpm)).build)


@pytest.mark.parametrize("kind", [["os", "system"], ["diffusers", "FluxPipeline"], "CLIPTextModel", 3, [None], {}])
@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae", "scheduler"])
def test_an_index_names_classes_from_a_list_only(sd: Path, part: str, kind: Any) -> None:
    index = json.loads((sd / "model_index.json").read_text())
    (sd / "model_index.json").write_text(json.dumps(index | {part: kind}))
    refused(rf"model_index\.json' gives the part {part} as", StableDiffusion(str(sd)).build)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_name_their_tensor(sd: Path, part: str) -> None:
    from safetensors.torch import load_file, save_file

    path = next((sd / part).glob("*.safetensors"))
    state = load_file(path)
    name = sorted(state)[-1]
    state[name].flatten()[0] = float("nan")
    save_file(state, path)
    refused(rf"{part}.*: {name} holds NaN or infinite values", use, sd)
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    checkpoint["out.2.bias"][0] = float("inf")
    torch.save(checkpoint, sd / "adm.pt")
    refused(r"adm\.pt'.*out\.2\.bias holds NaN", ADMSource(str(sd / "adm.pt"), str(CONFIG)).build)

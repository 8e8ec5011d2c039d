"""Sources by their id: what is fetched of a model, what the cache is enough for, what is said where neither helps."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.backbones.hub import Hub, ask, hub_at
from tests.backbones.test_adm import CHECKPOINT, CONFIG
from tests.backbones.test_damaged import run, use
from tests.metrics.toys import refused
from tests.tiny_sd import in_parts, save_ddpm, save_tiny
from unidad_pl.backbones import ADMSource, PretrainedUNet, StableDiffusion
from unidad_pl.files import BrokenFile
from unidad_pl.training.hparams import flatten

WEIGHTS = "diffusion_pytorch_model"
DDPM, SD = "google/ddpm-celebahq-256", "stabilityai/tiny"
CONFIGS = {"unet/config.json", "scheduler/scheduler_config.json"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is on the hub: networks with files of other kinds beside them."""
    root = tmp_path_factory.mktemp("hub")
    save_ddpm(root / DDPM)
    save_tiny(root / SD)
    shutil.rmtree(root / SD / "vocabulary")
    for folder, stem in ((f"{DDPM}/unet", WEIGHTS), (f"{SD}/unet", WEIGHTS), (f"{SD}/vae", WEIGHTS),
                         (f"{SD}/text_encoder", "model")):  # fmt: skip
        for name in (f"{stem}.fp16.safetensors", f"{stem}.bin", f"{stem}.non_ema.safetensors", "flax_model.msgpack"):
            (root / folder / name).write_bytes(b"never fetched")
    for name in ("README.md", "samples/0.png", "model.ckpt", "onnx/model.onnx", "safety_checker/config.json"):
        for model in (DDPM, SD):
            (root / model / name).parent.mkdir(exist_ok=True)
            (root / model / name).write_bytes(b"never fetched")
    return root


@pytest.fixture
def hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The models, on a server; the cache is empty."""
    monkeypatch.chdir(tmp_path)
    with hub_at(Path(shutil.copytree(models, tmp_path / "hub")), tmp_path / "cache", monkeypatch) as hub:
        yield hub


def state(source: Any) -> dict[str, torch.Tensor]:
    return dict(source.build().state_dict())


@pytest.mark.slow
def test_a_pixel_model_is_fetched_once_and_only_what_is_read(hub: Hub, models: Path) -> None:
    source = PretrainedUNet(DDPM)
    assert not hub.asked  # nothing before it is built
    built, local = state(source), state(PretrainedUNet(str(models / DDPM)))
    assert all(torch.equal(value, local[name]) for name, value in built.items())
    assert sorted(hub.fetched) == sorted(CONFIGS | {f"unet/{WEIGHTS}.safetensors"})
    asked = len(hub.asked)
    run(source)
    run(PretrainedUNet(DDPM, local_files_only=True))
    assert len(hub.asked) == asked  # the cache is enough


def test_sizes_need_no_weights(hub: Hub) -> None:
    """As 'unidad report memory' asks for them; what is left is fetched when the network is built."""
    source = PretrainedUNet(DDPM)
    source.architecture()
    assert set(hub.fetched) == CONFIGS
    run(source)
    assert sorted(hub.fetched) == sorted(CONFIGS | {f"unet/{WEIGHTS}.safetensors"})


def test_a_model_at_the_top_of_its_folder(hub: Hub) -> None:
    """As google/ddpm-celebahq-256 itself lies, of which there are safetensors only in some revisions."""
    top = hub.root / "google/flat"
    shutil.copytree(hub.root / DDPM / "unet", top)
    shutil.copy(hub.root / DDPM / "scheduler/scheduler_config.json", top)
    torch.save(load_file(top / f"{WEIGHTS}.safetensors"), top / f"{WEIGHTS}.bin")
    (top / f"{WEIGHTS}.safetensors").unlink()
    run(PretrainedUNet("google/flat"))
    assert sorted(hub.fetched) == ["config.json", f"{WEIGHTS}.bin", "scheduler_config.json"]


def test_a_pipeline_with_its_codec(hub: Hub) -> None:
    source = StableDiffusion(SD)
    codec = source.codec()
    assert not [name for name in hub.fetched if not name.endswith((".json", ".txt"))]
    codec.decode(torch.zeros(1, 4, 8, 8))  # without the UNet
    fetched = {name for name in hub.fetched if name.endswith((".safetensors", ".bin"))}
    assert fetched == {f"vae/{WEIGHTS}.safetensors", "text_encoder/model.safetensors"}
    source.build()
    assert len(hub.fetched) == len(set(hub.fetched))
    assert not any(word in name for name in hub.fetched for word in ("fp16", "bin", "non_ema", "safety", "README"))
    assert f"unet/{WEIGHTS}.safetensors" in hub.fetched


def test_other_weights_of_a_unet_and_an_adm_checkpoint_by_name(hub: Hub) -> None:
    place = hub.root / "someone/dmd"
    place.mkdir(parents=True)
    torch.save(load_file(hub.root / SD / "unet" / f"{WEIGHTS}.safetensors"), place / "pytorch_model.bin")
    shutil.copy(CHECKPOINT, place / "adm.pt")
    StableDiffusion(SD, unet_weights="someone/dmd/pytorch_model.bin").build()
    assert "pytorch_model.bin" in hub.fetched
    assert f"unet/{WEIGHTS}.safetensors" not in hub.fetched
    run(ADMSource("someone/dmd/adm.pt", str(CONFIG)))
    asked = len(hub.asked)
    run(ADMSource("someone/dmd/adm.pt", str(CONFIG), local_files_only=True))
    assert len(hub.asked) == asked
    for name in ("someone/dmd/no.pt", "someone/else/adm.pt"):
        refused(f"no weights file at '{name}'", ADMSource(name, str(CONFIG)).build, error=FileNotFoundError)
    nowhere = ADMSource("someone/dmd/other.pt", str(CONFIG), local_files_only=True)
    asked = len(hub.asked)
    refused("no weights file at 'someone/dmd/other.pt'", nowhere.build, error=FileNotFoundError)
    assert len(hub.asked) == asked


def test_weights_in_parts_and_half_a_download(hub: Hub, tmp_path: Path) -> None:
    folder = hub.root / DDPM / "unet"
    in_parts(folder, f"{WEIGHTS}.safetensors.index.json", "part[{}].safetensors")
    run(PretrainedUNet(DDPM))
    assert {name for name in hub.fetched if name.endswith("safetensors")} == {
        f"unet/part[{i}].safetensors" for i in (0, 1)
    }
    (lost,) = (tmp_path / "cache").rglob("part?1?.safetensors")
    lost.unlink()
    refused(r"part\[1\].*incomplete", PretrainedUNet(DDPM, local_files_only=True).build, error=FileNotFoundError)
    run(PretrainedUNet(DDPM))
    assert lost.exists()
    (folder / "part[1].safetensors").unlink()
    lost.unlink()
    refused(r"no weights file at .*part\[1\]", PretrainedUNet(DDPM).build, error=FileNotFoundError)


def test_a_model_of_another_kind_costs_no_download_of_weights(hub: Hub) -> None:
    index = hub.root / SD / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    refused("FluxPipeline", StableDiffusion(SD).build, error=BrokenFile)
    shutil.rmtree(hub.root / DDPM / "unet")
    refused("no config.json", PretrainedUNet(DDPM).build, error=FileNotFoundError)
    (hub.root / "someone/words").mkdir(parents=True)
    (hub.root / "someone/words/model.gguf").write_bytes(b"words")
    refused(
        "'someone/words' on Hugging Face has no config", PretrainedUNet("someone/words").build, error=FileNotFoundError
    )
    assert not [name for name in hub.fetched if not name.endswith((".json", ".txt"))]
    save_ddpm(hub.root / "someone/bare")
    (hub.root / "someone/bare/unet" / f"{WEIGHTS}.safetensors").unlink()
    message = f"neither unet/{WEIGHTS}.safetensors nor unet/{WEIGHTS}.bin"
    refused(message, PretrainedUNet("someone/bare").build, error=FileNotFoundError)


def test_processes_of_a_machine_take_turns(hub: Hub) -> None:
    hub.delay = 0.05
    with ThreadPoolExecutor(4) as ranks:
        first, *others = ranks.map(lambda _: state(PretrainedUNet(DDPM)), range(4))
    assert len(hub.fetched) == len(set(hub.fetched)) == 3
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


@pytest.mark.parametrize(("status", "code", "error", "message"), [
    (401, "RepoNotFound", FileNotFoundError, r"neither a folder nor a model on Hugging Face .*'hf download OWNER/NAME "
     r"--local-dir google/ddpm-celebahq-256'.*private one run 'hf auth login'"),
    (404, "RepoNotFound", FileNotFoundError, "neither a folder nor a model"),
    (401, None, ConnectionError, r"cannot be downloaded \(HfHubHTTPError: .*401.*'hf auth login'"),
    (403, None, ConnectionError, r"cannot be downloaded \(HfHubHTTPError: .*403.*'hf download"),
    (503, None, ConnectionError, r"cannot be downloaded \(HfHubHTTPError: .*503"),
    (401, "GatedRepo", PermissionError, "is gated: accept its terms at http://127.*/google/ddpm-celebahq-256 .*TOKEN"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_sentence(
    hub: Hub, status: int, code: str | None, error: type[Exception], message: str
) -> None:
    hub.failures[DDPM] = status, code
    refused(rf"'{DDPM}'.*{message}", PretrainedUNet(DDPM).build, error=error)
    assert len(hub.asked) == 1  # no attempts that would take their time


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_shows_its_files_and_gives_none(hub: Hub, status: int) -> None:
    """As the hub does it: anyone may list them."""
    hub.gated[SD] = status
    refused(f"'{SD}' is gated: accept its terms", StableDiffusion(SD).build, error=PermissionError)
    hub.gated["someone/dmd"] = status
    (hub.root / "someone/dmd").mkdir(parents=True)
    shutil.copy(CHECKPOINT, hub.root / "someone/dmd/adm.pt")
    refused("'someone/dmd' is gated", ADMSource("someone/dmd/adm.pt", str(CONFIG)).build, error=PermissionError)


def test_no_network_and_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.page = b"<!doctype html><html>Log in to the hotel's network</html>"
    refused(r"cannot be downloaded \(JSONDecodeError", PretrainedUNet(DDPM).build, error=ConnectionError)
    hub.page = None
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        ask(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "other", monkeypatch)
    refused(r"cannot be downloaded \(ConnectError: .*HTTPS_PROXY", PretrainedUNet(DDPM).build, error=ConnectionError)
    refused(r"cannot be downloaded", ADMSource("someone/dmd/adm.pt", str(CONFIG)).build, error=ConnectionError)
    offline = PretrainedUNet(DDPM, local_files_only=True)
    refused("local_files_only is set: nothing is downloaded", offline.build, error=FileNotFoundError)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(
        "HF_HUB_OFFLINE is set: nothing is downloaded.*--local-dir", PretrainedUNet(DDPM).build, error=FileNotFoundError
    )
    refused("no folder, and no OWNER/NAME", PretrainedUNet("/no/such/place").build, error=FileNotFoundError)


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    refused("cannot be stored in .*file.*set HF_HOME", PretrainedUNet(DDPM).build, error=PermissionError)


def test_where_a_model_comes_from_is_no_option_of_the_method() -> None:
    """A run may be resumed offline that began with a download."""
    for make in (PretrainedUNet, StableDiffusion, lambda *a, **k: ADMSource(*a, str(CONFIG), **k)):
        assert flatten(make("a/b")) == flatten(make("a/b", local_files_only=True))


def test_a_pipeline_from_the_cache_alone(hub: Hub) -> None:
    StableDiffusion(SD).build()
    asked = len(hub.asked)
    source = StableDiffusion(SD, local_files_only=True)
    use_cached = [source.build(), source.codec().embed(["a dog"]), source.architecture()]
    assert len(use_cached) == 3
    assert len(hub.asked) == asked
    use(Path(source.codec().folder))  # type: ignore[attr-defined]

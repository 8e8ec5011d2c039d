"""``unidad import adm`` and ``unidad restore adm``: folders that plain diffusers reads, and the way back."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from tests.backbones.test_adm import CHECKPOINT, CONFIG, IO, VARIANTS, random_state, shapes
from tests.metrics.toys import refused
from unidad_pl.backbones import ADMConfig, ADMStateDictAdapter, PretrainedUNet
from unidad_pl.backbones.adm_config import PRESETS
from unidad_pl.backbones.weights import read_weights
from unidad_pl.cli.main import main


def unidad(*args: Any) -> None:
    main([str(arg) for arg in args])


def test_an_imported_checkpoint_in_plain_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "models" / "tiny"
    unidad("import", "adm", "--checkpoint", CHECKPOINT, "--config", CONFIG, "--out", out)
    assert str(out) in capsys.readouterr().out
    unet = UNet2DModel.from_pretrained(out)
    with torch.no_grad():
        seen = unet(IO["x"], IO["t"]).sample
    torch.testing.assert_close(seen, IO["expected"], rtol=0, atol=2e-5)
    scheduler = DDPMScheduler.from_pretrained(out / "scheduler")
    source = PretrainedUNet(str(out)).build()
    torch.testing.assert_close(scheduler.alphas_cumprod, source.abar, rtol=1e-6, atol=0)
    assert (source.spec.prediction, scheduler.config["variance_type"]) == ("epsilon", "learned_range")
    assert not list(out.parent.glob("*.part*"))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_there_and_back_is_bit_equal(name: str, suffix: str, tmp_path: Path) -> None:
    adm = VARIANTS[name]
    original = ADMStateDictAdapter(adm).from_diffusers(random_state(adm))
    torch.save(original, tmp_path / "first.pt")
    flags = {key: value for key, value in vars(adm).items() if value is not None}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    paths = ("--checkpoint", tmp_path / "first.pt", "--config", tmp_path / "flags.json", "--out", tmp_path / "folder")
    unidad("import", "adm", *paths)
    unidad("restore", "adm", "--folder", tmp_path / "folder", "--out", tmp_path / f"second{suffix}")
    restored = read_weights(tmp_path / f"second{suffix}")
    assert set(restored) == set(original)
    assert all(torch.equal(restored[key], value) for key, value in original.items())


@pytest.mark.parametrize("prefix", ["module.", "unet.", "module.unet."])
def test_prefixes_of_the_released_code_are_taken_off(prefix: str, tmp_path: Path) -> None:
    state = read_weights(CHECKPOINT)
    prefixed = {prefix + name: value for name, value in state.items()}
    torch.save(prefixed, tmp_path / "pytorch_model.bin")
    seen = read_weights(tmp_path / "pytorch_model.bin")
    assert all(torch.equal(seen[name], value) for name, value in state.items())
    assert set(seen) == set(state)
    torch.save(prefixed | {"extra": torch.ones(1)}, tmp_path / "more.bin")
    paths = ("--checkpoint", tmp_path / "more.bin", "--config", CONFIG, "--out", tmp_path / "x")
    refused("unexpected", unidad, "import", "adm", *paths, error=SystemExit)
    assert not (tmp_path / "x").exists()


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploded",)


def test_a_checkpoint_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Bomb()}, "code.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("code.pt", "plain.pt"):
        request = ("import", "adm", "--checkpoint", name, "--config", CONFIG, "--out", "x")
        refused(rf"{name}.*may carry code, which is never run", unidad, *request, error=SystemExit)
    assert not Path("exploded").exists()


def test_wrong_requests_are_one_line(tmp_path: Path) -> None:
    first = ("import", "adm", "--checkpoint", CHECKPOINT, "--out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    for request, message in (
        ((*first, tmp_path / "a"), "either a preset or a config"),
        ((*first, tmp_path / "a", "--config", CONFIG, "--preset", "ffhq256"), "either a preset or a config"),
        ((*first, tmp_path / "a", "--preset", "ffhq512"), "no ADM preset 'ffhq512': there are ffhq256, lsun256"),
        ((*first, tmp_path / "a", "--preset", "ffhq256"), "do not fit the config"),
        ((*first, tmp_path / "full", "--config", CONFIG), "is there already"),
        (("restore", "adm", "--folder", tmp_path / "full", "--out", tmp_path / "b.pt"), r"it has no adm\.json"),
        (("restore", "adm", "--folder", tmp_path / "full", "--out", tmp_path / "full" / "mine.txt"), "there already"),
    ):
        refused(message, unidad, *request, error=SystemExit)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_the_published_presets() -> None:
    counts = {name: sum(shape.numel() for shape in shapes(adm).values()) for name, adm in PRESETS.items()}
    unconditional = 552_814_086
    labels = 1000 * 4 * 256  # one embedding of the time embedding's width for each class
    assert counts == {
        "ffhq256": unconditional, "lsun256": unconditional, "imagenet256_uncond": unconditional,
        "imagenet256": unconditional + labels,
        "imagenet64": 295_904_454,  # "296M" in table 4 of the ADM paper
    }  # fmt: skip
    assert ADMConfig.preset("imagenet256").classes == 1000

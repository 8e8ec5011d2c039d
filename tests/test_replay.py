"""The recordings of the authors' own step agree with this package, and the replay notices when they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.recording import Comparison, Recording, RecordingError, table
from tests.replay import Iteration, Setup, main, replay
from unidad_pl.backbones import ADMConfig

FIXTURES = Path(__file__).parent / "fixtures"
OFFICIAL = FIXTURES / "official_step"
CHECKPOINT = FIXTURES / "adm_tiny" / "adm_tiny.pt"

Change = Callable[[dict[str, Any]], None]


def altered(folder: Path, iteration: Change | None, setup: Change | None = None) -> Path:
    """A copy of the official recording with its two dicts changed."""
    for name, change in (("setup.pt", setup), ("iteration_gen.pt", iteration)):
        values = torch.load(OFFICIAL / name, weights_only=True)
        if change is not None:
            change(values)
        torch.save(values, folder / name)
    return folder


def remove(key: str) -> Change:
    return lambda values: values.pop(key)


def put(key: str, value: Any) -> Change:
    return lambda values: values.update({key: value})


def scale_one(key: str, factor: float) -> Change:
    """Multiply the largest entry of ``key``."""

    def change(values: dict[str, Any]) -> None:
        if isinstance(values[key], Tensor):
            values[key].view(-1)[values[key].abs().argmax()] *= factor
        else:
            values[key] *= factor

    return change


def test_official_step_in_float64() -> None:
    errors = replay(OFFICIAL, CHECKPOINT, None, "float64")
    assert len(errors) == 99
    assert max(errors.values()) < 1e-11


def test_official_step_in_float32() -> None:
    errors = replay(OFFICIAL, CHECKPOINT, CHECKPOINT.parent / "config.json", "float32")
    assert errors["iteration_gen/x"] < 2e-6


def test_altered_results_fail_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(values: dict[str, Any]) -> None:
        for key in ("dmd.target_normaliser", "grad_norm.fake"):
            scale_one(key, 1 + 1e-8)(values)

    assert main([str(altered(tmp_path, change)), "--checkpoint", str(CHECKPOINT), "--dtype", "float64"]) == 1
    failed = {line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL iteration")}
    assert failed == {"FAIL iteration_gen/dmd.target_normaliser", "FAIL iteration_gen/grad_norm.fake"}


def test_an_altered_draw_unknown_and_missing_keys_fail(tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        del values["dmd.noisy"], values["grad.fake.out.2.weight"]
        values["dmd.third_loss"] = 1.0
        scale_one("critic_real.eps", 1.01)(values)

    with pytest.raises(RecordingError) as error:
        replay(altered(tmp_path, change), CHECKPOINT, None, "float32")
    for text in (
        "lacks 'dmd.noisy'",
        "lacks 'grad.fake.out.2.weight'",
        "holds 'dmd.third_loss'",
        "critic_real.score: error",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize(("iteration", "setup", "message"), [
    (remove("unroll.z"), None, "lacks 'unroll.z'"),
    (remove("tt.index"), None, "lacks 'tt.index'"),
    (put("dmd.index", torch.tensor([19, 400])), None, r"\[19, 400\] must be 2 indices in 20..980"),
    (put("unroll.z", torch.zeros(3, 3, 32, 32)), None, "'unroll.z' has shape"),
    (dict.clear, None, "holds no turn"),
    (None, scale_one("source_sum", 1.001), "not the recording's checkpoint: source_sum of"),
    (None, remove("scale.fake"), "lacks 'scale.fake'"),
    (None, put("cfg.gan_head_type", "patch"), "gan_head_type is 'patch'"),
    (None, put("cfg.resolution", 64), "resolution is 64"),
    (None, put("head_taps", ["in0"]), "head_taps"),
])  # fmt: skip
def test_unusable_recordings_name_the_reason(iteration: Any, setup: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=message):
        replay(altered(tmp_path, iteration, setup), CHECKPOINT, None, "float32")


def test_missing_and_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cannot(why: str, folder: Path, checkpoint: Path, *options: str) -> None:
        assert main([str(folder), "--checkpoint", str(checkpoint), *options]) == 2
        assert why in capsys.readouterr().err

    cannot("has no iteration_*.pt", tmp_path, CHECKPOINT)
    (tmp_path / "iteration_gen.pt").write_bytes(b"no")
    cannot("no setup.pt", tmp_path, CHECKPOINT)
    wrong = "'nowhere.json' is neither a file nor a preset"
    cannot(wrong, OFFICIAL, tmp_path / "none.pt", "--config", "nowhere.json")
    (tmp_path / "setup.pt").write_bytes((OFFICIAL / "setup.pt").read_bytes())
    with pytest.raises(RecordingError, match=r"iteration_gen.pt cannot be read"):
        replay(tmp_path, CHECKPOINT, None, "float64")


def record(folder: Path, config: dict[str, Any], turns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a recording with other settings, its results computed by the replay itself.

    It proves nothing about the numbers; it shows that shapes and turns are read off the files.
    """
    setup = torch.load(OFFICIAL / "setup.pt", weights_only=True) | config
    torch.save(setup, folder / "setup.pt")
    random, shape = torch.Generator().manual_seed(3), (setup["cfg.batch_size"], 3, 32, 32)
    values: dict[str, Any] = {"real": torch.randn(shape, generator=random).clamp(-1, 1)}
    draws = {"guidance": ["fake", "critic_real", "critic_fake"], "generator": ["dmd", "ggan"], "target": ["tt"]}
    values["unroll.z"] = torch.randn(shape, generator=random)
    values["unroll.eps"] = torch.randn(setup["cfg.num_denoising_step"] - 1, *shape, generator=random)
    for name in [name for turn in turns.split() for name in draws[turn]]:
        values[f"{name}.index"] = torch.randint(20, 981, shape[:1], generator=random)
        values[f"{name}.eps"] = torch.randn(shape, generator=random)
    path = folder / "iteration_any.pt"
    torch.save(values, path)

    def write(self: Recording, key: str, ours: Any, *_: Any, **__: Any) -> None:
        values[key] = ours.detach() if isinstance(ours, Tensor) else ours
        self.used.add(key)

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "compare", write)
        adm = ADMConfig.load(CHECKPOINT.parent / "config.json")
        Iteration(Setup(folder, CHECKPOINT, adm, torch.float64), path).replay()
    torch.save({k: v for k, v in values.items() if k in ("x",) or k not in setup}, path)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "turns", "loss"), [
    ({"num_denoising_step": 1, "batch_size": 1, "gan_adv_loss": "hinge"}, "generator", "generator_loss"),
    ({"num_denoising_step": 2, "batch_size": 3, "gan_head_layers": "x"}, "guidance", "guidance_loss"),
    ({"dmd_target_weight": 0.0, "gen_cls_loss_weight": 2.0}, "generator target", "loss_target_teacher"),
])  # fmt: skip
def test_other_settings_and_turns(
    config: dict[str, Any], turns: str, loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taps = {"head_taps": ["in2", "mid"]} if "gan_head_layers" in config else {}
    record(tmp_path, {f"cfg.{name}": value for name, value in config.items()} | taps, turns, monkeypatch)
    errors = replay(tmp_path, CHECKPOINT, None, "float64")
    assert errors[f"iteration_any/{loss}"] < 1e-12
    generator, target = "generator" in turns, "dmd_target_weight" not in config
    assert ("iteration_any/gen_cls_loss" in errors) == generator
    assert ("iteration_any/dmd.target_loss" in errors) == (generator and target)
    assert ("iteration_any/grad.heads.mid.bias" in errors) == ("guidance" in turns)


def test_table_groups_every_key() -> None:
    lines = table([Comparison("a/dmd.x", 2e-9, 1e-9), Comparison("a/dmd.y", 0.0, 1e-9)])
    assert len(lines) == 2
    assert "FAIL dmd.x" in lines[1]

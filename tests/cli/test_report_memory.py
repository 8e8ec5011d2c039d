"""`unidad report memory`: the prediction against the allocator's own record of a real iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from tests.tiny_sd import WIDTH, save_unet
from tests.worlds import Gaussian, Stream, fit, groups, random_images, tiny_unet
from unidad_pl import AdaptationOptions, Diffusion, MemoryOptions, OptimizerOptions, UniDAD
from unidad_pl.backbones import ADMSource, LoRA, NewUNet, StableDiffusion
from unidad_pl.cli.main import main
from unidad_pl.cli.report_memory import GIB, MemoryReport, predict_memory, report_memory
from unidad_pl.condition import Condition
from unidad_pl.data.batch import Batch
from unidad_pl.denoiser import Codec

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SOURCE = dict(resolution=32, channels=(32, 64), attention_levels=(1,), layers=1, head_channels=16, patch_size=1)
FLAT = SOURCE | dict(channels=(32,), attention_levels=())  # storage-less operations are slow: fewer, with more bytes


class Watch(pl.Callback):
    """The most bytes the CPU allocator gave out in the second iteration, beyond those before it."""

    peak = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:  # the optimisers' states exist now
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            self.profiler.__exit__(None, None, None)
            now = 0
            events = self.profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
            for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
                now += event.nbytes()
                self.peak = max(self.peak, now)


class Latents(Codec):
    """Latents of pictures without a VAE, and a condition without a text encoder."""

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([images, images[:, :1]], dim=1)

    def embed(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Condition:
        return Condition(tokens=torch.ones(len(prompts), 77, WIDTH, device=device))


class Text(StableDiffusion):
    def codec(self) -> Codec:
        return Latents()


def prompted(batch: Batch) -> Batch:
    return dataclasses.replace(batch, prompts=["a prt dog"] * len(batch.images))


def measured(module: Any, batch: int, precision: Any) -> int:
    watch = Watch()
    data = Stream(random_images(batch, 32), batch_size=batch)
    if isinstance(module.source, Text):
        plain = data.train_dataloader
        data.train_dataloader = lambda: DataLoader(plain().dataset, None, collate_fn=prompted)  # type: ignore[method-assign]
    trainer = fit(module, 2, data, precision=precision, callbacks=[watch])
    states = [t for optimizer in trainer.optimizers for state in optimizer.state.values() for t in state.values()]
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers(), *states]}.values()
    return watch.peak + sum(t.numel() * t.element_size() for t in tensors)


CASES: dict[str, dict[str, Any]] = {
    "plain": dict(source=SOURCE),
    "one step, no target teacher, average, parts": dict(
        student__num_steps=1, target_teacher=None, training__ema_decay=0.9, training__accumulate=2
    ),
    "half teachers": dict(memory=MemoryOptions("steps", "bfloat16"), target_teacher=None),
    "the target teacher first": dict(target_teacher__adaptation=AdaptationOptions(pretrain=1, update="every")),
    # convolutions in bfloat16 are slow on CPUs
    "mixed, both": dict(source=FLAT | dict(channels=(16,)), precision="bf16-mixed", memory__checkpointing="both"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_prediction_and_measurement_differ_by_less_than_15_percent(case: str) -> None:
    options = dict(student__update_every=1, target_teacher__weight=0.5, student__num_steps=2) | CASES[case]
    precision = options.pop("precision", "32-true")
    source = options.pop("source", FLAT)
    make = lambda: UniDAD(NewUNet(**source), **groups(**options))  # type: ignore[arg-type]  # noqa: E731
    seen = measured(make(), 2, precision)
    report = predict_memory(make(), 2, precision)
    assert report.peak == pytest.approx(seen, rel=0.15)
    assert report.working > 0.25 * report.peak  # what is hard to know is not drowned by what is easy


def test_adapters_as_predicted_and_less_than_45_percent_of_full(tmp_path: Path) -> None:
    folder = str(save_unet(tmp_path, channels=(32, 64), size=32))

    def make(lora: LoRA | None) -> UniDAD:
        return UniDAD(Text(folder, lora=lora), **groups(student__update_every=1, target_teacher__weight=0.5,
                      student__num_steps=1, matching__guidance_scale=2.0, matching__noise_table="model",
                      denoising__weighting="eps", memory__checkpointing="both"))  # fmt: skip

    seen = measured(make(LoRA(rank=4)), 1, "32-true")
    report = predict_memory(make(LoRA(rank=4)), 1)
    assert report.peak == pytest.approx(seen, rel=0.15)
    assert sum(report.weights.values()) < 2 * max(report.weights.values())  # the base counts once
    assert seen <= 0.45 * measured(make(None), 1, "32-true")


def test_every_option_is_seen() -> None:
    source, exact = tiny_unet(channels=(16,), attention_levels=()), Gaussian(0.0)

    def peak(source: Any = exact, batch: int = 4, precision: str = "32-true", **options: Any) -> int:
        settings: dict[str, Any] = dict(student__update_every=1, student__num_steps=2, target_teacher=None, gan=None)
        module = UniDAD(source, **groups(**(settings | dict(training__ema_decay=0.5) | options)))
        return predict_memory(module, batch, precision).peak  # type: ignore[arg-type]

    unet = peak(source)
    assert unet > peak(source, memory__checkpointing="steps") > peak(source, memory__checkpointing="both")
    assert peak(source, memory__teacher_dtype="bfloat16") < unet
    plain = peak()  # what follows can be told from any network: one of few operations
    assert peak(batch=8) > 1.8 * plain
    assert peak(precision="64-true") > 1.8 * plain
    for name in ("teacher_device", "ema_device"):
        assert peak(**{f"memory__{name}": "cpu"}) < plain
    small = OptimizerOptions(algorithm="bitsandbytes.optim.AdamW8bit")
    assert peak(fake_score__optimizer=small) < plain
    report = predict_memory(Diffusion(source), 2)
    assert set(report.weights) == {"denoiser"}
    with pytest.raises(ValueError, match="precision must be"):
        predict_memory(Diffusion(tiny_unet()), 2, "16-mixed")


def test_the_rows_add_up_to_the_peak() -> None:
    report = MemoryReport(
        {"student": 7, "teacher": 8}, {"student": GIB, "teacher": 5 * GIB}, 2 * GIB, 3 * GIB, ("teacher",)
    )
    rows = {line.split("  ")[0]: float(line.split()[-2]) for line in report.table().splitlines()}
    assert rows.pop("teacher (8 parameters, on another device: not in the peak)") == 5
    assert rows.pop("peak") == sum(rows.values()) == 6


def test_the_ffhq_model_needs_no_weights() -> None:
    with torch.device("meta"):
        network = ADMSource("nowhere.pt", "ffhq256").architecture()
    assert sum(p.numel() for p in network.parameters()) == 552_814_086


def test_the_command_merges_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"class_path": "unidad_pl.NewUNet", "init_args": FLAT | {"channels": [16], "attention_levels": []}}
    less = {"student": {"num_steps": 1}, "target_teacher": None, "gan": None, "source": small}
    (tmp_path / "less.yaml").write_text(yaml.safe_dump({"model": {"init_args": less}}))
    main(["report", "memory", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(tmp_path / "less.yaml"),
          "--precision", "bf16-mixed"])  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith("one process, batch 10, bf16-mixed\n")
    (tmp_path / "run.yaml").write_text(
        "{trainer: {precision: null}, data: {init_args: {batch_size: 2}}}"
    )  # as runs save it
    assert report_memory(
        [str(CONFIGS / "quickstart.yaml"), str(tmp_path / "less.yaml"), str(tmp_path / "run.yaml")]
    ).startswith("one process, batch 2, 32-true\n")
    for name in ("student", "fake_score", "source_teacher", "ema", "optimiser states", "peak"):
        assert f"\n{name} " in printed
    assert "target_teacher" not in printed


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report_memory(["nowhere.yaml"])
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"data": {}}))
    with pytest.raises(ValueError, match="no entry 'model'"):
        report_memory([str(tmp_path / "a.yaml")])
    (tmp_path / "none.yaml").write_text("data: {init_args: {batch_size: 0}}")
    with pytest.raises(ValueError, match=r"batch_size must be .* got 0"):
        report_memory([str(CONFIGS / "quickstart.yaml"), str(tmp_path / "none.yaml")])
    with pytest.raises(ValueError, match="batch_size must be"):
        report_memory([str(CONFIGS / "quickstart.yaml")], batch_size=0)

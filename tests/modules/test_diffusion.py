"""Plain diffusion training and its samplers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worlds import FAST, Gaussian, Stream, fit, groups, tiny_unet, weights_sha
from unidad_pl import Diffusion, ExportOptions, LogNormal, OptimizerOptions, SamplingOptions
from unidad_pl.backbones import PretrainedUNet


def train_sha(iterations: int = 2, **options: Any) -> str:
    settings: dict[str, Any] = dict(source=tiny_unet(), optimizer=FAST, training__ema_decay=0.5)
    module = Diffusion(**groups(**(settings | options)))
    fit(module, iterations)
    return weights_sha(module)


CHANGES: dict[str, Any] = dict(
    source=tiny_unet(layers=2), optimizer=OptimizerOptions(lr=2e-3, warmup=0), lognormal=LogNormal(),
    denoising__weighting="eps", denoising__sigma_data=1.0, training__ema_decay=0.1, training__seed=1,
    training__accumulate=2,
)  # fmt: skip
ELSEWHERE = {"sampling", "export", "memory"}  # and training.classes and max_skipped


@pytest.mark.slow
def test_every_training_argument_changes_the_weights() -> None:
    plain = train_sha()
    assert all(train_sha(**{name: value}) != plain for name, value in CHANGES.items())
    assert len({train_sha(lognormal=noise) for noise in (LogNormal(), LogNormal(mean=0.0), LogNormal(std=0.5))}) == 3
    conditional = tiny_unet(attention_levels=(), num_classes=2)
    assert train_sha(source=conditional, training__classes=[0]) != train_sha(source=conditional)
    tested = {name.split("__")[0] for name in CHANGES} | ELSEWHERE
    assert tested == set(inspect.signature(Diffusion.__init__).parameters) - {"self"}


def test_every_sampling_argument_changes_the_samples() -> None:
    base = Diffusion(tiny_unet(), sampling=SamplingOptions(num_steps=4)).sample([3])
    for options in (SamplingOptions(num_steps=5), SamplingOptions("ddim", 4), SamplingOptions("few_step", 4)):
        assert not torch.equal(Diffusion(tiny_unet(), sampling=options).sample([3]), base)


def test_it_learns_the_mean_of_the_data() -> None:
    """Images of value v everywhere: the exact denoiser's mean must become v."""
    images = torch.full((4, 1, 8, 8), 204, dtype=torch.uint8)  # 0.6 in [-1, 1]
    setting = OptimizerOptions(lr=0.05, warmup=0, decay_to=0.02, arguments={"weight_decay": 0.0})
    module = Diffusion(Gaussian(-1.0), setting)
    fit(module, 150, Stream(images))
    assert float(module.denoiser.mu) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(("sampler", "steps"), [("heun", 40), ("ddim", 150)])  # DDIM is of first order only
def test_samplers_draw_from_an_exact_gaussian(sampler: Any, steps: int) -> None:
    module = Diffusion(Gaussian(0.2), sampling=SamplingOptions(sampler, steps))
    module.configure_model()
    raw = module.generate(module.denoiser, torch.arange(256), None)
    assert float(raw.mean()) == pytest.approx(0.2, abs=0.05)
    assert float(raw.std()) == pytest.approx(1.0, abs=0.05)


def test_the_schedule_can_be_extended_before_its_decay_begins() -> None:
    """A run planned for 40 steps and one planned for 80 are the same until the decay of the shorter one begins."""
    setting = OptimizerOptions(lr=1e-3, warmup=5, decay_to=0.1, decay_from=0.5)
    rates = [[setting.factor(step, total) for step in range(20)] for total in (40, 80)]
    assert rates[0] == rates[1]
    assert setting.factor(0, 40) == pytest.approx(1 / 5)
    assert setting.factor(39, 40) == pytest.approx(0.1)
    assert setting.factor(29, 40) == pytest.approx(0.1 + 0.9 * 0.5, abs=0.03)


@pytest.mark.slow
def test_every_optimisation_setting_acts() -> None:
    shas = [
        train_sha(optimizer=OptimizerOptions(**(dict(lr=1e-3, warmup=0) | change)))  # type: ignore[arg-type]
        for change in (
            {}, dict(warmup=5), dict(arguments={"betas": (0.5, 0.9)}), dict(arguments={"weight_decay": 0.5}),
            dict(arguments={"amsgrad": True}), dict(algorithm="torch.optim.SGD", arguments={"momentum": 0.9}),
            dict(clip=1e-3), dict(decay_to=0.1), dict(decay_to=0.1, decay_from=0.9),
        )
    ]  # fmt: skip
    plain, *changed, early, late = shas
    assert plain not in (*changed, early)
    assert late != early


def test_fine_tuning_changes_only_what_it_should() -> None:
    module = Diffusion(tiny_unet(), OptimizerOptions(lr=0.0, arguments={"weight_decay": 0.0}))
    module.configure_model()
    before = weights_sha(module.denoiser)
    fit(module, 2)
    assert weights_sha(module.denoiser) == before


def test_the_average_is_exported_in_the_form_sources_are_read(tmp_path: Path) -> None:
    export = ExportOptions(str(tmp_path / "full"))
    module = Diffusion(tiny_unet(), FAST, export=export, **groups(training__ema_decay=0.5))
    fit(module, 3)
    assert module.ema is not None
    assert weights_sha(PretrainedUNet(str(tmp_path / "full")).build()) == weights_sha(module.ema.module)
    module.export = ExportOptions(str(tmp_path / "half"), half=True)
    module.on_fit_end()
    sizes = [(tmp_path / n / "diffusion_pytorch_model.safetensors").stat().st_size for n in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_an_export_is_kept_by_a_fast_dev_run_and_found_below_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    module = Diffusion(tiny_unet(), FAST, export=ExportOptions("~/adapted"))
    fit(module, 1)
    before = weights_sha(PretrainedUNet(str(tmp_path / "adapted")).build())
    fit(Diffusion(tiny_unet(), FAST, export=ExportOptions("~/adapted")), 3, fast_dev_run=3)
    assert weights_sha(PretrainedUNet("~/adapted").build()) == before


def test_bad_optimisation_settings_are_refused() -> None:
    for name, value in (("clip", -1.0), ("lr", float("inf")), ("decay_to", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got {value:.0f}"):
            OptimizerOptions(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"torch\.optim\.SGD has no argument betas, only params, lr, momentum"):
        OptimizerOptions(algorithm="torch.optim.SGD", arguments={"betas": (0.5, 0.9)}).build([], 1)
    with pytest.raises(ValueError, match="full class path"):
        OptimizerOptions(algorithm="AdamW")
    with pytest.raises(ValueError, match="sampler must be one of heun, ddim, few_step"):
        Diffusion(tiny_unet(), sampling=SamplingOptions("euler"))  # type: ignore[arg-type]

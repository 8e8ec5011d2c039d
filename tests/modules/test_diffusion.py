"""Plain diffusion training and its samplers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worlds import Gaussian, Stream, fit, random_images, tiny_unet, weights_sha
from unidad_pl.backbones import PretrainedUNet
from unidad_pl.modules import Diffusion, Optimization

FAST = Optimization(lr=1e-3, warmup=0)


def train_sha(**options: Any) -> str:
    settings: dict[str, Any] = dict(source=tiny_unet(), optimization=FAST, ema_decay=0.5)
    module = Diffusion(**(settings | options))
    fit(module, 3)
    return weights_sha(module)


CHANGES: dict[str, dict[str, Any]] = {
    "source": dict(source=tiny_unet(layers=2)),
    "optimization": dict(optimization=Optimization(lr=2e-3, warmup=0)),
    "weighting": dict(weighting="eps"),
    "sigma_data": dict(sigma_data=1.0),
    "noise": dict(noise="lognormal"),
    "ema_decay": dict(ema_decay=0.1),
    "seed": dict(seed=1),
    "accumulate": dict(accumulate=2),
}
LOGNORMAL = {"lognormal_mean": dict(lognormal_mean=0.0), "lognormal_std": dict(lognormal_std=0.5)}


def test_every_training_argument_changes_the_weights() -> None:
    plain, lognormal = train_sha(), train_sha(noise="lognormal")
    assert all(train_sha(**options) != plain for options in CHANGES.values())
    assert all(train_sha(noise="lognormal", **options) != lognormal for options in LOGNORMAL.values())
    conditional = tiny_unet(attention_levels=(), num_classes=2)
    assert train_sha(source=conditional, classes=[0]) != train_sha(source=conditional)
    tested = (
        set(CHANGES)
        | set(LOGNORMAL)
        | {"classes", "memory", "sampler", "steps", "max_skipped", "export_to", "export_half"}
    )
    assert tested == set(inspect.signature(Diffusion.__init__).parameters) - {"self"}


def test_every_sampling_argument_changes_the_samples() -> None:
    base = Diffusion(tiny_unet(), steps=4).sample([3])
    for options in ({"steps": 5}, {"sampler": "ddim"}, {"sampler": "few_step"}):
        assert not torch.equal(Diffusion(tiny_unet(), **({"steps": 4} | options)).sample([3]), base)


def test_it_learns_the_mean_of_the_data() -> None:
    """Images of value v everywhere: the exact denoiser's mean must become v."""
    images = torch.full((4, 1, 8, 8), 204, dtype=torch.uint8)  # 0.6 in [-1, 1]
    setting = Optimization(lr=0.05, warmup=0, weight_decay=0.0, decay_to=0.02)
    module = Diffusion(Gaussian(-1.0), optimization=setting)
    fit(module, 150, Stream(images))
    assert float(module.denoiser.mu) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(("sampler", "steps"), [("heun", 40), ("ddim", 150)])  # DDIM is of first order only
def test_samplers_draw_from_an_exact_gaussian(sampler: Any, steps: int) -> None:
    module = Diffusion(Gaussian(0.2), sampler=sampler, steps=steps)
    module.configure_model()
    raw = module.generate(module.denoiser, torch.arange(256), None)
    assert float(raw.mean()) == pytest.approx(0.2, abs=0.05)
    assert float(raw.std()) == pytest.approx(1.0, abs=0.05)


def test_the_schedule_can_be_extended_before_its_decay_begins() -> None:
    """A run planned for 40 steps and one planned for 80 are the same until the decay of the shorter one begins."""
    setting = Optimization(lr=1e-3, warmup=5, decay_to=0.1, decay_from=0.5)
    rates = [[setting.factor(step, total) for step in range(20)] for total in (40, 80)]
    assert rates[0] == rates[1]
    assert setting.factor(0, 40) == pytest.approx(1 / 5)
    assert setting.factor(39, 40) == pytest.approx(0.1)
    assert setting.factor(29, 40) == pytest.approx(0.1 + 0.9 * 0.5, abs=0.03)


def test_every_optimisation_setting_acts() -> None:
    plain = train_sha(optimization=Optimization(lr=1e-3, warmup=0))
    for changed in (
        Optimization(lr=1e-3, warmup=5), Optimization(lr=1e-3, warmup=0, betas=(0.5, 0.9)),
        Optimization(lr=1e-3, warmup=0, weight_decay=0.5), Optimization(lr=1e-3, warmup=0, decay_to=0.1),
        Optimization(lr=1e-3, warmup=0, clip=1e-3), Optimization(lr=1e-3, warmup=0, optimizer="torch.optim.NAdam"),
        Optimization(lr=1e-3, warmup=0, options={"amsgrad": True}),
        Optimization(lr=1e-3, warmup=0, decay_to=0.1, decay_from=0.9),
    ):  # fmt: skip
        assert train_sha(optimization=changed) != plain or changed.decay_from, changed
    late = Optimization(lr=1e-3, warmup=0, decay_to=0.1, decay_from=0.9)
    early = Optimization(lr=1e-3, warmup=0, decay_to=0.1)
    assert train_sha(optimization=late) != train_sha(optimization=early)


def test_fine_tuning_changes_only_what_it_should() -> None:
    module = Diffusion(tiny_unet(), optimization=Optimization(lr=0.0, weight_decay=0.0))
    module.configure_model()
    before = weights_sha(module.denoiser)
    fit(module, 2, Stream(random_images()))
    assert weights_sha(module.denoiser) == before


def test_the_average_is_exported_in_the_form_sources_are_read(tmp_path: Path) -> None:
    module = Diffusion(tiny_unet(), optimization=FAST, ema_decay=0.5, export_to=str(tmp_path / "full"))
    fit(module, 3)
    assert module.ema is not None
    assert weights_sha(PretrainedUNet(str(tmp_path / "full")).build()) == weights_sha(module.ema.module)
    module.export_to, module.export_half = str(tmp_path / "half"), True
    module.on_fit_end()
    sizes = [(tmp_path / n / "diffusion_pytorch_model.safetensors").stat().st_size for n in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_bad_optimisation_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="clip=-1"):
        Optimization(clip=-1.0)
    with pytest.raises(ValueError, match="full class path"):
        Optimization(optimizer="AdamW")
    with pytest.raises(ValueError, match="sampler must be one of heun, ddim, few_step"):
        Diffusion(tiny_unet(), sampler="euler")  # type: ignore[arg-type]

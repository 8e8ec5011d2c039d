"""Flow-matching networks behind the sigma contract: against diffusers' scheduler, and against closed forms."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.backbones.test_scheduler import google
from tests.modules.test_gaussian_world import STEADY, train
from tests.worlds import GaussianDenoiser, fit, groups, tiny_unet, unidad
from unidad_pl import Diffusion, PretrainedUNet
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Parameterization, Prediction
from unidad_pl.export.student import export_student, load_export
from unidad_pl.losses import denoising_loss, dmd_gradient
from unidad_pl.sampling import ddim, heun
from unidad_pl.schedules import flow_sigmas

TIMES = torch.tensor([0.02, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_folder_is_read_as_diffusers_uses_it(shift: float, tmp_path: Path) -> None:
    scheduler, unet = FlowMatchEulerDiscreteScheduler(shift=shift), google().double()
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    network = PretrainedUNet(str(tmp_path)).build().double()
    scheduler.set_timesteps(5)
    eps = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    theirs = eps
    assert float(scheduler.sigmas[0]) == pytest.approx(1.0)
    times = scheduler.sigmas.double().clamp_max(0.999)  # there is no sigma for 1
    with torch.no_grad():
        for now, after in pairwise(times):  # Euler steps of the velocity, as the scheduler does
            theirs = theirs + (after - now) * unet(theirs, now * 1000).sample
        first = float(times[0] / (1 - times[0]))
        start = network.init_noise_sigma(first)
        assert start == pytest.approx(1000, rel=1e-6)
        ours = ddim(network, lambda: eps * (start / first), times / (1 - times))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    u = torch.arange(1, 1001) / 1000
    trained = (shift * u / (1 + (shift - 1) * u)).clamp_max(0.999)
    torch.testing.assert_close(network.native_sigmas, (trained / (1 - trained)).unique(), rtol=1e-3, atol=0)


class GaussianFlow(GaussianDenoiser):
    """The exact velocity of data N(mu, 1), read through the parameterisation of flows."""

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        how = Parameterization.of("flow", sigma, 0.5)
        t = (sigma / (1 + sigma)).view(-1, 1, 1, 1)
        seen = how.c_in * x
        variance = (1 - t) ** 2 + t**2
        velocity = (2 * t - 1) / variance * (seen - (1 - t) * self.mu) - self.mu  # E[eps - x0 | x_t]
        return how.prediction(x, velocity)


def test_the_exact_velocity_is_the_exact_denoiser() -> None:
    sigma, x = TIMES / (1 - TIMES), torch.randn(5, 1, 8, 8, dtype=torch.float64)
    flow, plain = (kind(0.7).double().predict(x, sigma) for kind in (GaussianFlow, GaussianDenoiser))
    torch.testing.assert_close(flow.x0, plain.x0)
    torch.testing.assert_close(flow.eps, plain.eps)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_the_matching_direction_is_that_of_the_noise_at_every_time(dtype: torch.dtype, close: float) -> None:
    """``sigma (eps_k - eps_F) = t (v_k - v_F)`` stays exact where sigma is large, in float32."""
    t, sigma = TIMES.to(dtype).view(-1, 1, 1, 1), (TIMES / (1 - TIMES)).to(dtype)
    x, eps, v_teacher, v_fake = torch.randn(4, 5, 1, 8, 8, dtype=dtype)
    noisy = x + sigma.view(-1, 1, 1, 1) * eps
    how = Parameterization.of("flow", sigma, 0.5)
    teacher, fake = (how.prediction(noisy, v) for v in (v_teacher, v_fake))
    found = dmd_gradient(x, noisy, sigma, fake.eps, teacher.eps)
    size = (x - teacher.x0).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, t * (v_teacher - v_fake) / size, rtol=close, atol=close)
    scaled = dmd_gradient(x, noisy, sigma, fake.eps, teacher.eps, "noisy", how.c_in)
    size = ((1 - t) * noisy - teacher.x0).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(scaled, t * (v_teacher - v_fake) / size, rtol=close, atol=close)


def test_the_flow_weight_is_the_plain_error_of_the_velocity() -> None:
    sigma = TIMES / (1 - TIMES)
    x0, eps, velocity = torch.randn(3, 5, 3, 4, 4, dtype=torch.float64)
    noisy = x0 + sigma.view(-1, 1, 1, 1) * eps
    guess = Parameterization.of("flow", sigma, 0.5).prediction(noisy, velocity).x0
    plain = (velocity - (eps - x0)).square().mean()
    torch.testing.assert_close(denoising_loss(guess, x0, sigma, "flow"), plain)


@pytest.mark.slow
@pytest.mark.parametrize(("a", "expected"), [(0.0, -2.0), (1.0, 2.0)])
def test_the_gaussian_world_has_the_same_fixed_points(
    a: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GaussianDenoiser, "predict", GaussianFlow.predict)
    options: dict[str, Any] = dict(target_teacher__weight=a) if a else dict(target_teacher=None)
    straight = replace(STEADY, lr=0.04)  # there is nothing to circle around
    module = train(200, denoising__weighting="flow", student__optimizer=straight, **options)
    assert float(module.student.mu) == pytest.approx(expected, abs=0.1)


def shifted(place: Path, shift: float) -> PretrainedUNet:
    network = tiny_unet(prediction="flow").build()
    network.spec = replace(network.spec, shift=shift)
    network.save_pretrained(place)
    return PretrainedUNet(str(place))


def test_steps_of_a_student_follow_the_shift_unless_they_are_chosen(tmp_path: Path) -> None:
    source = shifted(tmp_path, 3.0)
    module, chosen = unidad(source, student__num_steps=3), unidad(source, student__num_steps=3, student__sigma_max=20.0)
    for one in (module, chosen):
        one.configure_model()
    u = torch.tensor([1.0, 2 / 3, 1 / 3])
    assert module.sampler.sigmas == pytest.approx(flow_sigmas(u, 3.0).tolist(), rel=1e-4)
    assert module.sampler.sigmas[0] == pytest.approx(999, rel=1e-4)
    assert chosen.sampler.sigmas == pytest.approx([20.0, 10**0.5, 0.5])


@pytest.mark.slow
def test_from_scratch_to_an_exported_student(tmp_path: Path) -> None:
    teacher = Diffusion(tiny_unet(prediction="flow"), **groups(denoising__weighting="flow"))
    fit(teacher, 2)
    assert heun(teacher.denoiser, lambda: torch.randn(1, 3, 16, 16), torch.tensor([80.0, 1.0, 0.0])).isfinite().all()
    source = shifted(tmp_path / "source", 2.0)
    module = unidad(source, student__num_steps=2, matching__noise_table="model", denoising__weighting="flow")
    trainer = fit(module, 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    folder = export_student(str(tmp_path / "last.ckpt"), str(tmp_path / "out"))
    own = module.sample([3, 4])
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(seeds=[3, 4], output_type="pt").images * 2 - 1
    torch.testing.assert_close(theirs, own.clamp(-1, 1), atol=1e-5, rtol=0)
    student = load_export(str(folder))
    for steps in (1, 3):
        ours = student.with_steps(steps)
        assert ours.sigmas == pytest.approx(pipe._sigmas(steps), rel=1e-5)
        assert ours.sigmas[0] == pytest.approx(999, rel=1e-4)
    pipe.save_pretrained(tmp_path / "again")
    assert load_export(str(tmp_path / "again")).network.spec == student.network.spec

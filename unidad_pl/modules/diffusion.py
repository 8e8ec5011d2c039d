"""Ordinary diffusion training of one denoiser: pretrain a source teacher, or fine-tune one on the shots."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from unidad_pl.data.batch import Batch
from unidad_pl.denoiser import Denoiser, DenoiserSource
from unidad_pl.losses import Weighting, denoising_loss
from unidad_pl.modules.base import GenerativeModule
from unidad_pl.modules.frozen import Memory
from unidad_pl.modules.optimization import Optimization, check_choices, trained
from unidad_pl.sampling import FewStepSampler, ddim, heun, sampling_sigmas, seeded_noise
from unidad_pl.schedules import karras, log_linear
from unidad_pl.sharding import whole


class Diffusion(GenerativeModule):
    """Train one denoiser with the denoising loss, and sample from it.

    Used from scratch it makes a source teacher; started from one on a few shots it is the ``Adapt`` baseline
    (METHOD 7).

    Args:
        source: the network to train.
        optimization: its optimiser.
        weighting: loss weight over sigma, ``edm`` or ``eps``; see :func:`~unidad_pl.losses.denoising_weight`.
        sigma_data: standard deviation of the data in the ``edm`` weight.
        noise: how training sigmas are drawn: ``karras`` uniformly from the 1000-entry table of the method,
            ``lognormal`` from ``exp(N(mean, std))`` (Karras et al. 2022).
        lognormal_mean: mean of ``ln sigma`` for ``lognormal``.
        lognormal_std: standard deviation of ``ln sigma`` for ``lognormal``.
        sampler: ``heun`` or ``ddim`` over ``steps`` Karras sigmas, or ``few_step`` (the student's sampler, to compare a
            plain teacher with a student at equal cost).
        steps: sampling steps. Heun evaluates the network ``2 steps - 1`` times.
        export_to: folder that the network (its average, if there is one) is written to when the fit ends, in the form
            :class:`~unidad_pl.backbones.PretrainedUNet` reads; null: none.
        export_half: write it in half precision.
        seed: see :class:`~unidad_pl.modules.base.GenerativeModule`.
        accumulate: see there.
        ema_decay: see there.
        max_skipped: see there.
        classes: see there.
        memory: see there.
    """

    clock = "denoiser"
    sampled_name = "denoiser"
    free_options = (*GenerativeModule.free_options, "sampler", "steps", "export_to", "export_half")

    def __init__(
        self,
        source: DenoiserSource,
        optimization: Optimization = Optimization(),  # noqa: B008 (a value, never mutated)
        weighting: Weighting = "edm",
        sigma_data: float = 0.5,
        noise: Literal["karras", "lognormal"] = "karras",
        lognormal_mean: float = -1.2,
        lognormal_std: float = 1.2,
        sampler: Literal["heun", "ddim", "few_step"] = "heun",
        steps: int = 25,
        export_to: str | None = None,
        export_half: bool = False,
        seed: int | None = None,
        accumulate: int = 1,
        ema_decay: float = 0.0,
        max_skipped: int = 10,
        classes: list[int] | None = None,
        memory: Memory = Memory(),  # noqa: B008
    ) -> None:
        super().__init__(seed, accumulate, ema_decay, max_skipped, classes, memory)
        check_choices(
            weighting=(weighting, ("eps", "edm")),
            noise=(noise, ("karras", "lognormal")),
            sampler=(sampler, ("heun", "ddim", "few_step")),
        )
        self.source = source
        self.optimization = optimization
        self.weighting, self.sigma_data = weighting, sigma_data
        self.noise, self.lognormal_mean, self.lognormal_std = noise, lognormal_mean, lognormal_std
        self.sampler, self.steps = sampler, steps
        self.export_to, self.export_half = export_to, export_half
        self.register_buffer("sigmas", karras(), persistent=False)
        self.sigmas: Tensor

    def build_networks(self) -> None:
        self.denoiser = self.source.build()

    @property
    def sampled_source(self) -> DenoiserSource:
        return self.source

    def few_step(self) -> tuple[FewStepSampler, float]:
        if self.sampler != "few_step":
            raise ValueError(
                f"this Diffusion module is sampled with {self.sampler} in {self.steps} steps, it is no few-step "
                f"student: use its export_to for the network alone, or sampler: few_step"
            )
        sampler = FewStepSampler(log_linear(self.steps))
        return sampler, float(log_linear(2)[-1])

    def optimizations(self) -> dict[str, Optimization]:
        return {"denoiser": self.optimization}

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        return {"denoiser": [{"params": trained(self.denoiser)}]}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        total = torch.zeros((), device=self.device)
        for part in self.micro_batches(batch):
            images, cond = part.images, part.cond
            sigma = self.draw_sigma(len(images))
            noisy = images + sigma.view(-1, 1, 1, 1) * torch.randn_like(images)
            x0 = self.denoiser(noisy, sigma, cond)
            loss = denoising_loss(x0, images, sigma, self.weighting, self.sigma_data)
            self.backward_into(loss, "denoiser")
            total += loss.detach() / self.accumulate
        self.log("loss/denoising", total, prog_bar=True)
        self.finish_iteration(self.step("denoiser"))

    def draw_sigma(self, batch: int) -> Tensor:
        """Training sigmas [batch]."""
        if self.noise == "lognormal":
            return (self.lognormal_mean + self.lognormal_std * torch.randn(batch, device=self.device)).exp()
        return self.sigmas[torch.randint(len(self.sigmas), (batch,), device=self.device)]

    def on_fit_end(self) -> None:
        """Export, once, on rank 0.

        Raises:
            TypeError: the network cannot be written as a folder.
        """
        if self.export_to is None:
            return
        network: Any = self.ema.module if self.ema is not None else self.denoiser
        if not hasattr(network, "save_pretrained"):
            raise TypeError(f"export_to needs a network with save_pretrained, {type(network).__name__} has none")
        weights = {name: whole(value) for name, value in network.state_dict().items()}  # all ranks gather
        if self.trainer.is_global_zero:
            alone: Any = self.source.architecture()
            alone.load_state_dict(weights)
            alone.save_pretrained(self.export_to, torch.float16 if self.export_half else torch.float32)

    def generate(self, network: Denoiser, seeds: Tensor, cond: Tensor | None) -> Tensor:
        noise = seeded_noise(seeds, network.image_shape, self.device)
        if self.sampler == "few_step":
            return self.few_step()[0](network, noise, cond)
        return {"heun": heun, "ddim": ddim}[self.sampler](network, noise, sampling_sigmas(self.steps), cond)

"""Ordinary diffusion training of one denoiser: pretrain a source teacher, or fine-tune one on the shots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unidad_pl.checks import check_at_least, check_given, check_options, check_path, check_positive, check_whole
from unidad_pl.condition import Condition
from unidad_pl.data.batch import Batch
from unidad_pl.denoiser import Denoiser, DenoiserSource, as_source
from unidad_pl.files import expanded
from unidad_pl.losses import denoising_loss
from unidad_pl.modules.options import DenoisingOptions
from unidad_pl.sampling import FewStepSampler, ddim, heun, sampling_sigmas, seeded_noise
from unidad_pl.schedules import MOST_STEPS, karras, log_linear
from unidad_pl.strategies.fsdp import full
from unidad_pl.training.hparams import TrainingOptions
from unidad_pl.training.module import GenerativeModule
from unidad_pl.training.networks import MemoryOptions, trained
from unidad_pl.training.noise import NoiseTable
from unidad_pl.training.optimization import OptimizerOptions


@dataclass
class LogNormal:
    """Training sigmas ``exp(N(mean, std))`` (Karras et al. 2022), e.g. ``Diffusion(source, lognormal=LogNormal())``.

        >>> LogNormal()
        LogNormal(mean=-1.2, std=1.2)

    For a flow network these are logit-normal times (Esser et al. 2024: mean 0, std 1); a shift s of the times adds
    ``ln s`` to the mean.

    Attributes:
        mean: of ``ln sigma``.
        std: standard deviation of ``ln sigma``.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        check_options(self)
        check_at_least(-20, 20, mean=self.mean)
        check_positive(10, std=self.std)

    def draw(self, images: Tensor) -> Tensor:
        """One sigma [B] for each of ``images`` [B, C, H, W]."""
        return (self.mean + self.std * torch.randn(len(images), device=images.device)).exp().to(images.dtype)


@dataclass
class SamplingOptions:
    """How a plain diffusion model is sampled.

        >>> SamplingOptions("few_step", num_steps=3)
        SamplingOptions(sampler='few_step', num_steps=3)

    Attributes:
        sampler: ``heun`` or ``ddim`` over Karras sigmas, or ``few_step`` (the student's sampler, to compare a plain
            teacher with a student at equal cost).
        num_steps: sampling steps. Heun evaluates the network ``2 num_steps - 1`` times.
    """

    sampler: Literal["heun", "ddim", "few_step"] = "heun"
    num_steps: int = 25

    def __post_init__(self) -> None:
        check_options(self)
        check_whole(1, MOST_STEPS, num_steps=self.num_steps)


@dataclass
class ExportOptions:
    """Where the network (its average, if there is one) is written when the fit ends.

        >>> ExportOptions("models/adapted", half=True)
        ExportOptions(folder='models/adapted', half=True)

    Attributes:
        folder: in the form :class:`~unidad_pl.backbones.PretrainedUNet` reads.
        half: write it in half precision.
    """

    folder: str
    half: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        check_given(folder=self.folder)
        check_path(folder=self.folder)


class Diffusion(GenerativeModule):
    """Train one denoiser with the denoising loss, and sample from it.

    Used from scratch it makes a source teacher; started from one on a few shots it is plain fine-tuning, the paper's
    first stage of Adapt-then-Distill.

        >>> from unidad_pl import Diffusion, NewUNet
        >>> module = Diffusion(NewUNet(channels=(32,), attention_levels=()), sampling=SamplingOptions("ddim", 4))
        >>> module.sample(seeds=[0]).shape
        torch.Size([1, 3, 32, 32])

    Args:
        source: the network to train.
        optimizer: its optimiser.
        denoising: weight of the loss over sigma.
        lognormal: how training sigmas are drawn; null: uniformly from the method's Karras table of 1000.
        sampling: how it is sampled.
        export: where the trained network is written; null: nowhere.
        training: seed, micro-batches, average, classes.
        memory: what trades time for memory.
    """

    free_options = (*GenerativeModule.free_options, "sampling", "export")

    def __init__(
        self,
        source: DenoiserSource,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 (values, never mutated)
        denoising: DenoisingOptions = DenoisingOptions(),  # noqa: B008
        lognormal: LogNormal | None = None,
        sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
        export: ExportOptions | None = None,
        training: TrainingOptions = TrainingOptions(),  # noqa: B008
        memory: MemoryOptions = MemoryOptions(),  # noqa: B008
    ) -> None:
        super().__init__("denoiser", "denoiser", training, memory)
        if memory.checkpointing in ("steps", "both") or memory.teacher_device or memory.teacher_dtype != "float32":
            raise ValueError(
                "memory.checkpointing: steps, teacher_device and teacher_dtype do nothing here: there is no student "
                "and no frozen teacher. Use checkpointing: blocks, or leave them out"
            )
        self.source, self.optimizer_options, self.denoising = as_source(source), optimizer, denoising
        self.lognormal, self.sampling, self.export = lognormal, sampling, export
        self.register_buffer("sigmas", karras(), persistent=False)
        self.sigmas: Tensor

    def build_networks(self) -> None:
        self.denoiser = self.build(self.source)

    @property
    def sampled_source(self) -> DenoiserSource:
        return self.source

    def few_step(self) -> tuple[FewStepSampler, float]:
        if self.sampling.sampler != "few_step":
            raise ValueError(
                f"this Diffusion module is sampled with {self.sampling.sampler} in {self.sampling.num_steps} steps, it "
                f"is no few-step student: use its export for the network alone, or sampler: few_step"
            )
        sampler = FewStepSampler(log_linear(self.sampling.num_steps), standard=True)
        return sampler, float(log_linear(2)[-1])

    def optimizers_of_groups(self) -> dict[str, OptimizerOptions]:
        return {"denoiser": self.optimizer_options}

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        return {"denoiser": [{"params": trained(self.denoiser)}]}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for part in self.micro_batches(batch):
            images, cond = part.images, part.cond
            sigma = None if self.lognormal is None else self.lognormal.draw(images)
            noisy, sigma = NoiseTable(self.sigmas).add(images, sigma=sigma)
            x0 = self.denoiser(noisy, sigma, cond)
            loss = denoising_loss(x0, images, sigma, self.denoising.weighting, self.denoising.sigma_data)
            self.backward_into(loss, "denoiser")
            self.log_mean("loss/denoising", loss, prog_bar=True)
        self.finish_iteration(self.step("denoiser"))

    def on_fit_end(self) -> None:
        """Export, once, on rank 0; not where a ``fast_dev_run`` has trained nothing.

        Raises:
            TypeError: the network cannot be written as a folder.
        """
        if self.export is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        network: Any = self.ema.module if self.ema is not None else self.denoiser
        if not hasattr(network, "save_pretrained"):
            raise TypeError(f"export needs a network with save_pretrained, {type(network).__name__} has none")
        weights = {name: full(value) for name, value in network.state_dict().items()}  # all ranks gather
        if self.trainer.is_global_zero:
            alone: Any = self.source.architecture()
            alone.load_state_dict(weights)
            alone.save_pretrained(expanded(self.export.folder), torch.float16 if self.export.half else torch.float32)

    def generate(self, network: Denoiser, seeds: Tensor, cond: Condition | None) -> Tensor:
        noise = seeded_noise(seeds, network.image_shape, self.device)
        if self.sampling.sampler == "few_step":
            return self.few_step()[0].fitted_to(network)(network, noise, cond)
        sample = heun if self.sampling.sampler == "heun" else ddim
        return sample(network, noise, sampling_sigmas(self.sampling.num_steps), cond)

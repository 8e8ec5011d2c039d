"""Uni-DAD: distil a diffusion model to a few steps AND adapt it to a new domain, in one run (arXiv 2511.18281).

Four networks of one architecture: the frozen source teacher S, the target teacher T, the fake score F with
discriminator heads on its encoder, and the student G. ``training_step`` is one iteration; docs/method.md explains it.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unidad_pl import losses
from unidad_pl.condition import Condition
from unidad_pl.data.batch import Batch, EncodedBatch
from unidad_pl.denoiser import Denoiser, DenoiserSource, as_source
from unidad_pl.discriminator import MultiHeadDiscriminator, accuracy
from unidad_pl.flops import uncounted
from unidad_pl.modules.options import (
    DenoisingOptions,
    FakeScoreOptions,
    GANOptions,
    MatchingOptions,
    StudentOptions,
    TargetTeacherOptions,
    teacher_weights,
)
from unidad_pl.sampling import FewStepSampler, random_noise, seeded_noise
from unidad_pl.schedules import index_range, karras, log_linear
from unidad_pl.training.hparams import TrainingOptions
from unidad_pl.training.module import GenerativeModule
from unidad_pl.training.networks import MemoryOptions, alike, frozen, predict_on_own_device, trained, warn_of_distilled
from unidad_pl.training.noise import NoiseTable
from unidad_pl.training.optimization import OptimizerOptions


class UniDAD(GenerativeModule):
    """Student, fake score with discriminator heads, and target teacher, trained together.

        >>> from unidad_pl import PretrainedUNet, UniDAD
        >>> module = UniDAD(PretrainedUNet("builtin:cartoon_teacher"))
        >>> module.sample(seeds=[0, 1]).shape  # what trainer.fit(module, data) improves
        torch.Size([2, 3, 32, 32])

    The defaults are the paper's for few-shot image generation.

    Args:
        source: the source model S; F, G and T start from it too.
        student: the student G, its steps and optimiser.
        fake_score: the fake score F and its optimiser.
        target_teacher: the target teacher T; null: source only (a = 0).
        matching: distribution matching with S and T; null: GAN only.
        denoising: the denoising losses of F and T.
        gan: the discriminator; null: distribution matching only.
        training: seed, micro-batches, average, classes.
        memory: what trades time for memory.

    Raises:
        ValueError: options that do not go together; says which and the way out.
    """

    def __init__(
        self,
        source: DenoiserSource,
        student: StudentOptions = StudentOptions(),  # noqa: B008 (values, never mutated)
        fake_score: FakeScoreOptions = FakeScoreOptions(),  # noqa: B008
        target_teacher: TargetTeacherOptions | None = TargetTeacherOptions(),  # noqa: B008
        matching: MatchingOptions | None = MatchingOptions(),  # noqa: B008
        denoising: DenoisingOptions = DenoisingOptions(),  # noqa: B008
        gan: GANOptions | None = GANOptions(),  # noqa: B008
        training: TrainingOptions = TrainingOptions(),  # noqa: B008
        memory: MemoryOptions = MemoryOptions(),  # noqa: B008
    ) -> None:
        self.teacher_weights = teacher_weights(matching, target_teacher)
        self.target_options = target_teacher if "target" in self.teacher_weights else None
        self.adaptation = self.target_options.adaptation if self.target_options else None
        frozen_networks = ["source_teacher"] * ("source" in self.teacher_weights)
        frozen_networks += ["target_teacher"] * (self.target_options is not None and self.adaptation is None)
        super().__init__("student", "fake", training, memory, frozen_networks)
        if matching is None and (gan is None or not gan.student_weight):
            raise ValueError("matching is null, and gan too or its student_weight 0: the student has no loss")
        if self.adaptation and self.adaptation.pretrain and (student.init_from or fake_score.init_from):
            raise ValueError("pretrain starts G and F from T: leave it 0, or their init_from null")
        if self.adaptation and self.adaptation.updates > 1 and training.accumulate > 1:
            raise ValueError(f"adaptation.updates {self.adaptation.updates} needs training.accumulate: 1: use one")
        self.source, self.student_options, self.fake_options = as_source(source), student, fake_score
        self.matching, self.denoising, self.gan = matching, denoising, gan
        self.pretrain = self.adaptation.pretrain if self.adaptation else 0
        sigmas = log_linear(student.num_steps, *student.sigma_range)
        again = memory.checkpointing in ("steps", "both")
        self.sampler = FewStepSampler(sigmas, student.gradient, again, not student.sigmas_chosen)
        self.keep_image_gradients = False
        self.image_gradients: dict[str, Tensor] = {}

    # -- networks and optimisers ---------------------------------------------------------------------------------

    sigmas: Tensor

    def build_networks(self) -> None:
        source = self.build(self.source)
        warn_of_distilled(source)

        def start(init_from: DenoiserSource | None) -> Denoiser:
            return alike(self.build(init_from), source) if init_from else copy.deepcopy(source)

        self.fake_score = start(self.fake_options.init_from)
        self.student = start(self.student_options.init_from)
        if self.target_options is not None:
            self.target_teacher = start(self.target_options.init_from)
        if "source" in self.teacher_weights:
            self.source_teacher = source
        if self.gan is not None:
            self.fake_score.depth_of(self.gan.taps)  # refuses what is no tap
            channels, chosen = self.fake_score.tap_channels, self.gan.taps
            taps = channels if chosen is None else {name: channels[name] for name in chosen}
            self.discriminator = MultiHeadDiscriminator(taps, self.gan.kind, self.gan.reduction)
        if not self.student.free_steps:
            self.student_options.refuse_sigmas()
        self.sampler = self.sampler.fitted_to(self.student)
        own_table = self.matching is not None and self.matching.noise_table == "model"
        self.register_buffer("sigmas", source.native_sigmas if own_table else karras(), persistent=False)
        self.low_entries = max(1, self.noise.up_to(2 * self.denoising.sigma_data))
        self.gan_last = self.noise.up_to(math.inf if self.gan is None else self.gan.sigma_max or math.inf) - 1
        if self.gan_last < 0:
            raise ValueError(f"gan.sigma_max must reach the smallest sigma, {float(self.sigmas[0]):g}")

    @property
    def noise(self) -> NoiseTable:
        """What all networks but the student are trained and asked at."""
        return NoiseTable(self.sigmas)

    @property
    def sampled_source(self) -> DenoiserSource:
        return self.student_options.init_from or self.source

    def few_step(self) -> tuple[FewStepSampler, float]:
        return self.sampler, self.student_options.sigma_range[1]

    def optimizers_of_groups(self) -> dict[str, OptimizerOptions]:
        found = {"student": self.student_options.optimizer, "fake": self.fake_options.optimizer}
        return found | ({"target": self.adaptation.optimizer} if self.adaptation else {})

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        fake: list[dict[str, Any]] = [{"params": trained(self.fake_score)}]
        if self.gan is not None:
            lr = self.fake_options.optimizer.lr if self.gan.lr is None else self.gan.lr
            fake.append({"params": list(self.discriminator.parameters()), "lr": lr})
        groups = {"student": [{"params": trained(self.student)}], "fake": fake}
        if self.adaptation:
            groups["target"] = [{"params": trained(self.target_teacher)}]
        return groups

    def updates_of(self, group: str, iterations: int) -> int:
        if group == "target" and self.adaptation and self.adaptation.until is not None:
            iterations = min(iterations, self.adaptation.until)
        alone = min(self.pretrain, iterations)
        every = group == "fake" or (group == "target" and self.adaptation and self.adaptation.update == "every")
        r = self.student_options.update_every
        due = iterations - alone if every else -(-iterations // r) + -alone // r
        return alone + due * self.adaptation.updates if group == "target" and self.adaptation else due

    def iteration_kind(self) -> object:
        alone, update = self.iteration < self.pretrain, self.iteration % self.student_options.update_every == 0
        return "target" if alone else (update, self._target_updates(update), self._stop())

    def costliest_iteration(self) -> int:
        every = self.student_options.update_every
        return every * (self.pretrain // every + 1) if self.pretrain else 0  # one that updates the student

    def takes_prior(self) -> bool:
        return self.adaptation is not None

    def refuse_to_shard(self) -> str | None:
        if self.gan is not None and (self.gan.r1 or self.gan.gradient_penalty):
            return "FSDP2 has no second derivatives: leave gan.r1 and gan.gradient_penalty at 0"
        return super().refuse_to_shard()

    # -- one iteration -------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if self.iteration < self.pretrain:
            self._adapt(batch)
            return
        if self.iteration == self.pretrain > 0:
            self._start_from_target()
        update = self.iteration % self.student_options.update_every == 0
        target_updates = self._target_updates(update)
        stepped, self.image_gradients = False, {}
        for part in self.micro_batches(batch):
            real, cond = part.images, part.cond
            with torch.set_grad_enabled(update):
                x = self.draw_student_images(len(real), cond)  # K steps of G
            if update:
                self.backward_into(self.student_loss(x, cond, part.source_cond), "student")
                stepped = part.last and self.step("student")  # now, so that its gradient makes room for F's
            self.backward_into(self.fake_loss(x.detach(), real, cond), "fake")
            if part.last:
                self.step("fake")
            if target_updates:
                self.backward_into(self.target_loss(real, cond, part.prior), "target")
        for number in range(target_updates):
            if number:
                self.backward_into(self.target_loss(real, cond, part.prior), "target")
            self.step("target")
        self.finish_iteration(stepped)

    def _adapt(self, batch: Batch) -> None:
        """One iteration of T alone."""
        for part in self.micro_batches(batch):
            self.backward_into(self.target_loss(part.images, part.cond, part.prior), "target")
        self.step("target")
        self.count(self.clock)
        self.finish_iteration(False)

    def _start_from_target(self) -> None:
        """G, its average and F become what T is by now."""
        for network in (self.student, self.fake_score, *([] if self.ema is None else [self.ema.module])):
            network.load_state_dict(self.target_teacher.state_dict())

    def _target_updates(self, student_update: bool) -> int:
        """How often T is updated in this iteration."""
        adaptation = self.adaptation
        if adaptation is None or self.iteration >= (adaptation.until or math.inf):
            return 0
        return adaptation.updates if student_update or adaptation.update == "every" else 0

    def draw_student_images(self, batch: int, cond: Condition | None) -> Tensor:
        """``x = G-unroll(z)`` [B, C, H, W]; ``backward_simulation`` stops at a step all ranks draw alike."""
        z = random_noise(batch, self.student.image_shape, self.device)
        return self.sampler(self.student, z, cond, self._stop())

    def _stop(self) -> int | None:
        return self.shared_randint(len(self.sampler)) if self.sampler.gradient == "backward_simulation" else None

    # -- the student's loss --------------------------------------------------------------------------------------

    def student_loss(self, x: Tensor, cond: Condition | None, source_cond: Condition | None = None) -> Tensor:
        """``L_G = (1 - a) L_S + a L_T + lambda_G L_adv`` on student images ``x`` with a graph to G.

        The gradient of the first two with respect to ``x`` is ``((1 - a) g_S + a g_T) / numel`` (eq. 5).
        """
        terms = self.matching_losses(x, cond, source_cond)
        if self.gan is not None and self.gan.student_weight:
            adversarial = losses.generator_loss(self._frozen_logits(x, cond), self.gan.loss)
            terms["adversarial"] = self.gan.student_weight * self.log_mean("loss/student_adversarial", adversarial)
        if self.keep_image_gradients:
            with uncounted():
                for name, term in terms.items():
                    (rows,) = torch.autograd.grad(term / self.accumulate, x, retain_graph=True)
                    self.image_gradients[name] = torch.cat([self.image_gradients.get(name, rows[:0]), rows])
        return torch.stack(list(terms.values())).sum()

    def matching_losses(self, x: Tensor, cond: Condition | None, source_cond: Condition | None) -> dict[str, Tensor]:
        """The weighted losses of the teachers, which see F's noisy images (eq. 3-4).

        S gets ``source_cond`` where there is one: the prompt without the subject's token.
        """
        if self.matching is None:
            return {}
        noisy, sigma = self.noise.add(x.detach(), *index_range(len(self.noise), *self.matching.range))
        scale = self.matching.guidance_scale
        away = self.embed([self.matching.negative_prompt or ""]) if scale > 1 else None
        conds = {"source": cond if source_cond is None else source_cond, "target": cond}
        with torch.no_grad():
            fake_eps = self.fake_score.predict(noisy, sigma, cond).eps
            teachers = {name: getattr(self, f"{name}_teacher") for name in self.teacher_weights}
            eps = {
                name: predict_on_own_device(teacher, noisy, sigma, conds[name], away, scale).eps
                for name, teacher in teachers.items()
            }
        torch.clear_autocast_cache()  # torch reuses casts made without a graph, and their weights get no gradient
        terms = {}
        for name, weight in self.teacher_weights.items():
            how = self.matching.normalizer
            scale_in = teachers[name].input_scale(sigma) if how == "noisy" else None
            g = losses.dmd_gradient(x.detach(), noisy, sigma, fake_eps, eps[name], how, scale_in)
            terms[f"dmd_{name}"] = weight * self.log_mean(f"loss/dmd_{name}", losses.dmd_loss(x, g))
        return terms

    def _frozen_logits(self, x: Tensor, cond: Condition | None) -> list[Tensor]:
        # Checkpointed blocks are computed again in the backward pass, when the flags are back: the same flags then.
        # Gradient reaches the student alone either way, see backward_into.
        checkpointed = self.memory.checkpointing in ("blocks", "both")
        with nullcontext() if checkpointed else frozen(self.fake_score, self.discriminator):
            noisy, sigma = self.noise.add(x, 0, self.gan_last)
            return self.logits(noisy, sigma, cond)

    # -- the losses of F with its heads, and of T ----------------------------------------------------------------

    def fake_loss(self, x: Tensor, real: Tensor, cond: Condition | None) -> Tensor:
        """``L_F = L_denoise + lambda_D L_D`` on detached student images ``x`` and real images (eq. 6 and 8)."""
        loss = self.log_mean("loss/fake", self.denoise(self.fake_score, x, cond), prog_bar=True)
        if self.gan is not None:
            loss = loss + self.gan.critic_weight * self.critic_loss(x, real, cond, self.gan)
        return loss

    def critic_loss(self, x: Tensor, real: Tensor, cond: Condition | None, gan: GANOptions) -> Tensor:
        """The discriminator's loss with its penalties; gradient into the heads and F's encoder."""
        noisy_real, sigma = self.noise.add(real, 0, self.gan_last)
        noisy_real.requires_grad_(gan.r1 > 0)
        shared = sigma if gan.noise == "shared" else None
        noisy_fake, sigma_fake = self.noise.add(x, 0, self.gan_last, shared)
        both = None if cond is None else Condition.cat([cond, cond])
        logits = self.logits(torch.cat([noisy_real, noisy_fake]), torch.cat([sigma, sigma_fake]), both)
        logits_real, logits_fake = zip(*(logit.chunk(2) for logit in logits), strict=True)  # one pass for both
        loss = self.log_mean("loss/critic", losses.critic_loss(logits_real, logits_fake, gan.loss))
        self.log_mean("critic/accuracy", accuracy(logits_real, logits_fake))
        if gan.r1:
            loss = loss + gan.r1 * losses.r1_penalty(logits_real, noisy_real)
        if gan.gradient_penalty:
            share = torch.rand(len(x), 1, 1, 1, device=x.device)
            between, sigma = self.noise.add(share * real + (1 - share) * x, 0, self.gan_last)
            between.requires_grad_(True)
            loss = loss + gan.gradient_penalty * losses.gradient_penalty(self.logits(between, sigma, cond), between)
        return loss

    def logits(self, noisy: Tensor, sigma: Tensor, cond: Condition | None) -> list[Tensor]:
        """The heads' logits of noisy images; F is evaluated up to the deepest head, at most its middle block."""
        assert self.gan is not None
        some = () if self.gan.taps is None else (self.gan.taps,)
        # Fused attention kernels have no second derivative, which the penalties need.
        with sdpa_kernel(SDPBackend.MATH) if self.gan.r1 or self.gan.gradient_penalty else nullcontext():
            return self.discriminator(self.fake_score.taps(noisy, sigma, cond, *some))

    def target_loss(self, real: Tensor, cond: Condition | None, prior: EncodedBatch | None = None) -> Tensor:
        """T's denoising loss on the real images (eq. 7), and on ``prior``, pictures of the class, if there are some."""
        assert self.adaptation is not None
        share = self.adaptation.low_noise_share
        loss = self.denoise(self.target_teacher, real, cond, share)
        if prior:
            loss = loss + prior.weight * self.denoise(self.target_teacher, prior.images, prior.cond, share)
        return self.log_mean("loss/target", loss, prog_bar=True)

    def denoise(self, network: Denoiser, images: Tensor, cond: Condition | None, low_share: float = 0.0) -> Tensor:
        """Denoising loss of ``network`` at sigmas of the table, a share of them up to twice ``sigma_data``."""
        sigma = self.noise.draw_low(images, low_share, self.low_entries) if low_share else None
        noisy, sigma = self.noise.add(images, sigma=sigma)
        x0, how = network(noisy, sigma, cond), self.denoising
        return losses.denoising_loss(x0, images, sigma, how.weighting, how.sigma_data)

    # -- sampling ------------------------------------------------------------------------------------------------

    def generate(self, network: Denoiser, seeds: Tensor, cond: Condition | None) -> Tensor:
        return self.sampler(network, seeded_noise(seeds, network.image_shape, self.device), cond)

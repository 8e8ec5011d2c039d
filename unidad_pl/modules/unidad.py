"""Uni-DAD: distil a diffusion model to a few steps AND adapt it to a new domain, in one run (arXiv 2511.18281).

Four networks of one architecture (METHOD 1): the frozen source teacher S, the target teacher T, the fake score F with
discriminator heads on its encoder, and the student G. ``training_step`` is one iteration of METHOD section 6.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor

from unidad_pl.data.batch import Batch, EncodedBatch
from unidad_pl.denoiser import Denoiser, DenoiserSource
from unidad_pl.discriminator import Critic, MultiHeadDiscriminator
from unidad_pl.losses import (
    Normalizer,
    Weighting,
    dmd_gradient,
    dmd_loss,
    generator_loss,
)
from unidad_pl.modules.adversarial import AdversarialModule
from unidad_pl.modules.frozen import Memory, predict_where_it_is
from unidad_pl.modules.optimization import Optimization, check_choices, trained
from unidad_pl.sampling import FewStepSampler, GradientMode, random_noise, seeded_noise
from unidad_pl.schedules import index_range, karras, log_linear


class UniDAD(AdversarialModule):
    """Student, fake score with discriminator heads, and target teacher, trained together (METHOD 1-6).

    The defaults are METHOD 7's for few-shot image generation.

    Args:
        source: the source model S; F, G and T start from it too.
        student_source: where G starts from instead, e.g. an already distilled student.
        fake_source: where F starts from instead, e.g. the fake score of that distillation.
        target_source: where T starts from instead, e.g. an already adapted model.
        target: ``train`` T on the shots, or use it ``frozen``.
        target_update: T is trained on the iterations that update the ``student``, or on ``every`` one.
        target_iterations: T is trained in the first so many iterations only: it learns the new domain long before it
            knows the shots by heart. null: always.
        adapt_first: iterations at the start in which T alone is trained; G and F then start from what it has become:
            for a domain far from the source, where G would spend most of the run on its way. 0: none, as in the paper.
        target_steps: updates of T in an iteration that trains T, each with fresh noise on the same images: T,
            which costs little beside the student, gets ahead of it.
        target_fine: share of T's training noise that is drawn from sigmas up to twice ``sigma_data`` alone. Texture is
            what T learns last, and a handful of shots does not make T know it by heart. 0: none, as in the paper.
        steps: K, the student's sampling steps.
        sigma_max: sigma of the student's first step.
        sigma_end: sigma of its last step.
        gradient: ``unroll``, ``last`` or ``backward_simulation``, see :class:`~unidad_pl.sampling.FewStepSampler`.
        student_every: r, the student is updated on every r-th iteration.
        target_weight: a in [0, 1]; the student follows ``(1 - a) g_S + a g_T``. 0: T is not built, 1: S is not.
        dmd_weights: (w_S, w_T) instead of (1 - a, a), for weights that do not sum to one.
        guidance_scale: classifier-free guidance of both teachers in the DMD, for text-to-image models; 1: none.
        negative_prompt: what guidance leads away from.
        dmd_range: part of the noise table the DMD sigmas are drawn from, as two fractions of its length.
        normalizer: ``clean`` or ``noisy``, see :func:`~unidad_pl.losses.dmd_gradient`.
        noise_table: ``karras`` (1000 entries, rho 7, 0.002..80) or the ``model``'s own sigmas.
        weighting: of the denoising losses, ``edm`` or ``eps``, see :func:`~unidad_pl.losses.denoising_weight`.
        sigma_data: standard deviation of the data in the ``edm`` weighting, and what ``target_fine`` goes by.
        critic: the GAN's settings.
        student_optimization: G's optimiser.
        fake_optimization: the optimiser of F and the heads.
        target_optimization: T's optimiser.
        ema_decay: see :class:`~unidad_pl.modules.base.GenerativeModule`; the average is over G.
        seed: see there.
        accumulate: see there.
        max_skipped: see there.
        classes: see there.
        memory: see there.

    Raises:
        ValueError: a weight or range that makes no sense; the message says which.
    """

    clock = "fake"
    sampled_name = "student"

    def __init__(
        self,
        source: DenoiserSource,
        student_source: DenoiserSource | None = None,
        fake_source: DenoiserSource | None = None,
        target_source: DenoiserSource | None = None,
        target: Literal["train", "frozen"] = "train",
        target_update: Literal["student", "every"] = "student",
        target_iterations: int | None = None,
        adapt_first: int = 0,
        target_steps: int = 1,
        target_fine: float = 0.0,
        steps: int = 3,
        sigma_max: float = 80.0,
        sigma_end: float = 0.5,
        gradient: GradientMode = "unroll",
        student_every: int = 5,
        target_weight: float = 0.25,
        dmd_weights: tuple[float, float] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        dmd_range: tuple[float, float] = (0.02, 0.98),
        normalizer: Normalizer = "clean",
        noise_table: Literal["karras", "model"] = "karras",
        weighting: Weighting = "edm",
        sigma_data: float = 0.5,
        critic: Critic = Critic(),  # noqa: B008 (a value, never mutated)
        student_optimization: Optimization = Optimization(),  # noqa: B008
        fake_optimization: Optimization = Optimization(),  # noqa: B008
        target_optimization: Optimization = Optimization(),  # noqa: B008
        ema_decay: float = 0.0,
        seed: int | None = None,
        accumulate: int = 1,
        max_skipped: int = 10,
        classes: list[int] | None = None,
        memory: Memory = Memory(),  # noqa: B008
    ) -> None:
        super().__init__(seed, accumulate, ema_decay, max_skipped, classes, memory)
        check_choices(
            target=(target, ("train", "frozen")),
            target_update=(target_update, ("student", "every")),
            noise_table=(noise_table, ("karras", "model")),
            normalizer=(normalizer, ("clean", "noisy")),
            weighting=(weighting, ("eps", "edm")),
        )
        if not 0 <= target_weight <= 1 or not 0 <= target_fine <= 1 or guidance_scale < 1:
            raise ValueError(
                f"target_fine and target_weight (a) must be in [0, 1] and guidance_scale >= 1, "
                f"got {target_fine}, {target_weight} and {guidance_scale}"
            )
        self.guidance_scale, self.negative_prompt = guidance_scale, negative_prompt
        if min(student_every, target_steps, 1 if target_iterations is None else target_iterations) < 1:
            raise ValueError(
                f"student_every, target_steps and target_iterations must be >= 1, "
                f"got {student_every}, {target_steps} and {target_iterations}"
            )
        if target_steps > 1 and accumulate > 1:
            raise ValueError(f"target_steps {target_steps} needs accumulate: 1, got {accumulate}: use one of the two")
        self.source_weight, self.target_weight = dmd_weights or (1 - target_weight, target_weight)
        if min(self.source_weight, self.target_weight) < 0 or self.source_weight + self.target_weight == 0:
            raise ValueError(f"dmd_weights must be >= 0 and not both 0, got {dmd_weights}")
        if self.target_weight and target == "frozen" and target_source is None:
            raise ValueError(
                "a frozen target teacher that starts from the source model is the source model: give target_source, "
                "or train it (target: train), or use target_weight: 0"
            )
        if target_source is not None and not self.target_weight:
            raise ValueError("target_source does nothing while the target teacher's weight is 0: set target_weight")
        self.source, self.student_source = source, student_source
        self.fake_source, self.target_source = fake_source, target_source
        self.trains_target = self.target_weight > 0 and target == "train"
        if adapt_first < 0 or (adapt_first and (not self.trains_target or student_source or fake_source)):
            raise ValueError(
                f"adapt_first must be >= 0, and above 0 only with a target teacher that is trained and without a "
                f"student_source or fake_source, which it would replace; got {adapt_first}"
            )
        if target_iterations is not None and adapt_first > target_iterations:
            raise ValueError(
                f"adapt_first trains T for {adapt_first} iterations, but target_iterations ends its training after "
                f"{target_iterations}: set target_iterations to {adapt_first} or more"
            )
        self.frozen_networks = ("source_teacher",) * (self.source_weight > 0)
        self.frozen_networks += ("target_teacher",) * (self.target_weight > 0 and target == "frozen")
        self.target_update, self.target_iterations, self.target_fine = target_update, target_iterations, target_fine
        self.student_every, self.target_steps, self.adapt_first = student_every, target_steps, adapt_first
        checkpointed = memory.checkpointing in ("steps", "both")
        self.sampler = FewStepSampler(log_linear(steps, sigma_max, sigma_end), gradient, checkpointed)
        self.sigma_end = sigma_end
        self.dmd_range, self.normalizer, self.noise_table = dmd_range, normalizer, noise_table
        self.weighting, self.sigma_data = weighting, sigma_data
        self.critic = critic
        self._optimizations = {"student": student_optimization, "fake": fake_optimization}
        if self.trains_target:
            self._optimizations["target"] = target_optimization
        if not 0 <= dmd_range[0] <= dmd_range[1] <= 1:
            raise ValueError(f"dmd_range must be two fractions 0 <= low <= high <= 1, got {list(dmd_range)}")
        self.keep_image_gradients = False
        self.image_gradients: dict[str, Tensor] = {}

    # -- networks and optimisers ---------------------------------------------------------------------------------

    def build_networks(self) -> None:
        source = self.source.build()
        self.fake_score = self.fake_source.build() if self.fake_source else copy.deepcopy(source)
        self.student = self.student_source.build() if self.student_source else copy.deepcopy(source)
        if self.target_weight:
            self.target_teacher = self.target_source.build() if self.target_source else copy.deepcopy(source)
        if self.source_weight:
            self.source_teacher = source
        if self.critic.critic_weight:
            taps = self.critic.head_taps(self.fake_score.tap_channels)
            self.discriminator = MultiHeadDiscriminator(taps, self.critic.kind, self.critic.reduction)
        self.sampler = self.sampler.fitted_to(self.student)
        sigmas = karras() if self.noise_table == "karras" else source.native_sigmas
        self.register_buffer("sigmas", sigmas, persistent=False)
        self.sigmas: Tensor
        critic_max = self.critic.sigma_max if self.critic.sigma_max is not None else float("inf")
        self.critic_entries = int((sigmas <= critic_max).sum())
        self.fine_entries = max(1, int((sigmas <= 2 * self.sigma_data).sum()))
        if not self.critic_entries:
            raise ValueError(f"critic sigma_max {critic_max} is below the smallest sigma {float(sigmas[0]):g}")

    @property
    def sampled_source(self) -> DenoiserSource:
        return self.student_source or self.source

    def few_step(self) -> tuple[FewStepSampler, float]:
        return self.sampler, self.sigma_end

    def optimizations(self) -> dict[str, Optimization]:
        return self._optimizations

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        fake: list[dict[str, Any]] = [{"params": trained(self.fake_score)}]
        if self.critic.critic_weight:
            lr = self.critic.lr if self.critic.lr is not None else self._optimizations["fake"].lr
            fake.append({"params": list(self.discriminator.parameters()), "lr": lr})
        groups = {"student": [{"params": trained(self.student)}], "fake": fake}
        if self.trains_target:
            groups["target"] = [{"params": trained(self.target_teacher)}]
        return groups

    def steps_of(self, group: str, iterations: int) -> int:
        if group == "target" and self.target_iterations is not None:
            iterations = min(iterations, self.target_iterations)
        alone = min(self.adapt_first, iterations)
        every = group == "fake" or (group == "target" and self.target_update == "every")
        due = iterations - alone if every else -(-(iterations - alone) // self.student_every)
        return alone + due * self.target_steps if group == "target" else due

    # -- one iteration (METHOD 6) --------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if int(self.iteration) < self.adapt_first:
            self._adapt(batch)
            return
        if int(self.iteration) == self.adapt_first > 0:
            self._start_from_target()
        update = int(self.iteration) % self.student_every == 0
        update_target = self._target_is_due(update)
        for part in self.micro_batches(batch):
            real, cond = part.images, part.cond
            with torch.set_grad_enabled(update):
                x = self.draw_student_images(len(real), cond)
            if update:
                self.backward_into(self.student_loss(x, cond, part.source_cond), "student")
            self.backward_into(self.fake_loss(x.detach(), real, cond), "fake")
            if update_target:
                self.backward_into(self.target_loss(real, cond, part.prior), "target")
        stepped = update and self.step("student")
        self.step("fake")
        for number in range(self.target_steps if update_target else 0):
            if number:
                self.backward_into(self.target_loss(real, cond, part.prior), "target")
            self.step("target")
        self.finish_iteration(stepped)

    def _adapt(self, batch: Batch) -> None:
        """One iteration of T alone."""
        for part in self.micro_batches(batch):
            self.backward_into(self.target_loss(part.images, part.cond, part.prior), "target")
        self.step("target")
        self._count(self.clock)  # an iteration all the same
        self.finish_iteration(False)

    def _start_from_target(self) -> None:
        """G, its average and F become what T is by now."""
        networks = [self.student, self.fake_score] + ([] if self.ema is None else [self.ema.module])
        for network in networks:
            network.load_state_dict(self.target_teacher.state_dict())

    def _target_is_due(self, update: bool) -> bool:
        if not self.trains_target or int(self.iteration) >= (self.target_iterations or math.inf):
            return False
        return update or self.target_update == "every"

    def draw_student_images(self, batch: int, cond: Tensor | None) -> Tensor:
        """``x = G-unroll(z)`` [B, C, H, W]; ``backward_simulation`` stops at a step all ranks draw alike."""
        simulated = self.sampler.gradient == "backward_simulation"
        stop = self.shared_randint(len(self.sampler)) if simulated else None
        return self.sampler(self.student, random_noise(batch, self.student.image_shape, self.device), cond, stop)

    def student_loss(self, x: Tensor, cond: Tensor | None, source_cond: Tensor | None = None) -> Tensor:
        """``L_G = L_DMD + lambda_G L_adv`` on student images ``x`` with a graph to G."""
        terms = self.dmd_terms(x, cond, source_cond)
        if self.critic.student_weight:
            adversarial = generator_loss(self._frozen_logits(x, cond), self.critic.loss)
            self._log_loss("student_adversarial", adversarial)
            terms["adversarial"] = self.critic.student_weight * adversarial
        if self.keep_image_gradients:
            self.image_gradients = {
                name: torch.autograd.grad(term, x, retain_graph=True)[0].detach() for name, term in terms.items()
            }
        return torch.stack(list(terms.values())).sum()

    def dmd_terms(self, x: Tensor, cond: Tensor | None, source_cond: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted DMD losses of the two teachers; both see the same noisy images as F (eq. 3-5).

        S is told ``source_cond`` where there is one: the prompt without the subject's token.
        """
        noisy, sigma = self.add_noise(x.detach(), *index_range(len(self.sigmas), *self.dmd_range))
        guide = (self._embed([self.negative_prompt]) if self.guidance_scale > 1 else None, self.guidance_scale)
        teachers, terms = {}, {}
        if self.source_weight:
            teachers["source"] = (self.source_weight, self.source_teacher, cond if source_cond is None else source_cond)
        if self.target_weight:
            teachers["target"] = (self.target_weight, self.target_teacher, cond)
        with torch.no_grad():
            fake_eps = self.fake_score.predict(noisy, sigma, cond).eps
            teacher_eps = {
                name: predict_where_it_is(teacher, noisy, sigma, told, *guide).eps
                for name, (_, teacher, told) in teachers.items()
            }
        torch.clear_autocast_cache()  # torch reuses casts made without a graph, and their weights get no gradient
        for name, (weight, *_) in teachers.items():
            direction = dmd_gradient(x.detach(), noisy, sigma, fake_eps, teacher_eps[name], self.normalizer)
            loss = dmd_loss(x, direction)
            self._log_loss(f"dmd_{name}", loss)
            terms[f"dmd_{name}"] = weight * loss
        return terms

    def fake_loss(self, x: Tensor, real: Tensor, cond: Tensor | None) -> Tensor:
        """``L_F = L_denoise + lambda_D L_adv`` on detached student images ``x`` and real images (eq. 6 and 8)."""
        loss = self.denoise(self.fake_score, x, cond)
        self._log_loss("fake", loss, prog_bar=True)
        if self.critic.critic_weight:
            loss = loss + self.critic.critic_weight * self.critic_loss(x, real, cond)
        return loss

    def target_loss(self, real: Tensor, cond: Tensor | None, prior: EncodedBatch | None = None) -> Tensor:
        """T's denoising loss on the real images (eq. 7), and on ``prior``, pictures of the class, if there are some."""
        loss = self.denoise(self.target_teacher, real, cond, self.target_fine)
        if prior:
            kept = self.denoise(self.target_teacher, prior.images, prior.cond, self.target_fine)
            loss = loss + prior.weight * kept
        self._log_loss("target", loss, prog_bar=True)
        return loss

    # -- sampling ------------------------------------------------------------------------------------------------

    def generate(self, network: Denoiser, seeds: Tensor, cond: Tensor | None) -> Tensor:
        return self.sampler(network, seeded_noise(seeds, network.image_shape, self.device), cond)

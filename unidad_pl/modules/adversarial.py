"""Uni-DAD's losses around F and its heads: noise from the table, denoising, the critic's loss and its logits."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unidad_pl.denoiser import Denoiser
from unidad_pl.discriminator import Critic, MultiHeadDiscriminator, accuracy
from unidad_pl.losses import Weighting, critic_loss, denoising_loss, gradient_penalty, r1_penalty
from unidad_pl.modules.base import GenerativeModule
from unidad_pl.modules.optimization import frozen


class AdversarialModule(GenerativeModule):
    """A module with a fake score F whose encoder carries discriminator heads (METHOD 5)."""

    critic: Critic
    fake_score: Denoiser
    discriminator: MultiHeadDiscriminator
    sigmas: Tensor
    """[N] the noise table, ascending."""
    critic_entries: int
    """How many of the table's entries the critic sees."""
    fine_entries: int
    """How many of them are weak noise, up to twice ``sigma_data``; at least one."""
    weighting: Weighting
    sigma_data: float

    def refuse_to_slice(self) -> str | None:
        if self.critic.r1 or self.critic.gradient_penalty:
            return "FSDP2 has no second derivatives: leave critic.r1 and critic.gradient_penalty at 0"
        return super().refuse_to_slice()

    def denoise(self, network: Denoiser, images: Tensor, cond: Tensor | None, fine: float = 0.0) -> Tensor:
        """Denoising loss of ``network`` at sigmas of the table, a share ``fine`` of them up to twice ``sigma_data``."""
        sigma, entries = None, len(self.sigmas)
        if fine:
            low = torch.rand(len(images), device=images.device) < fine
            index = torch.rand(len(images), device=images.device) * torch.where(low, self.fine_entries, entries)
            sigma = self.sigmas[index.long()].to(images.dtype)
        noisy, sigma = self.add_noise(images, 0, entries - 1, sigma)
        return denoising_loss(network(noisy, sigma, cond), images, sigma, self.weighting, self.sigma_data)

    def critic_loss(self, x: Tensor, real: Tensor, cond: Tensor | None) -> Tensor:
        """The discriminator's loss with its penalties; gradient into the heads and F's encoder."""
        noisy_real, sigma = self.add_noise(real, 0, self.critic_entries - 1)
        noisy_real.requires_grad_(self.critic.r1 > 0)
        shared = sigma if self.critic.noise == "shared" else None
        noisy_fake, sigma_fake = self.add_noise(x, 0, self.critic_entries - 1, shared)
        both = None if cond is None else torch.cat([cond, cond])
        logits = self.logits(torch.cat([noisy_real, noisy_fake]), torch.cat([sigma, sigma_fake]), both)
        logits_real, logits_fake = zip(*(logit.chunk(2) for logit in logits), strict=True)  # one pass for both
        loss = critic_loss(logits_real, logits_fake, self.critic.loss)
        self._log_loss("critic", loss)
        self.log("critic/accuracy", accuracy(logits_real, logits_fake), rank_zero_only=True)
        if self.critic.r1:
            loss = loss + self.critic.r1 * r1_penalty(logits_real, noisy_real)
        if self.critic.gradient_penalty:
            share = torch.rand(len(x), 1, 1, 1, device=x.device)
            between, sigma = self.add_noise(share * real + (1 - share) * x, 0, self.critic_entries - 1)
            between.requires_grad_(True)
            loss = loss + self.critic.gradient_penalty * gradient_penalty(self.logits(between, sigma, cond), between)
        return loss

    def logits(self, noisy: Tensor, sigma: Tensor, cond: Tensor | None) -> list[Tensor]:
        """The heads' logits of noisy images; F is evaluated up to the deepest head, at most its middle block."""
        # Fused attention kernels have no second derivative, which the penalties need.
        penalised = self.critic.r1 or self.critic.gradient_penalty
        some = () if self.critic.taps is None else (self.critic.taps,)
        with sdpa_kernel(SDPBackend.MATH) if penalised else nullcontext():
            return self.discriminator(self.fake_score.taps(noisy, sigma, cond, *some))

    def _frozen_logits(self, x: Tensor, cond: Tensor | None) -> list[Tensor]:
        # Checkpointed blocks are computed again in the backward pass, when the flags are back: the same flags then.
        # Gradient reaches the student alone either way, see backward_into.
        checkpointed = self.memory.checkpointing in ("blocks", "both")
        with nullcontext() if checkpointed else frozen(self.fake_score, self.discriminator):
            noisy, sigma = self.add_noise(x, 0, self.critic_entries - 1)
            return self.logits(noisy, sigma, cond)

    def add_noise(self, images: Tensor, first: int, last: int, sigma: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``images + sigma * eps`` with one table entry in [first, last] and one eps per image, or the given sigma."""
        if sigma is None:
            index = torch.randint(first, last + 1, (len(images),), device=images.device)
            sigma = self.sigmas[index].to(images.dtype)
        return images + sigma.view(-1, 1, 1, 1) * torch.randn_like(images), sigma

    def _log_loss(self, name: str, value: Tensor, prog_bar: bool = False) -> None:
        self.log(f"loss/{name}", value.detach(), prog_bar=prog_bar, rank_zero_only=True)

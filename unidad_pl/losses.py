"""The losses of Uni-DAD as pure functions of tensors. Equation numbers are those of the paper (arXiv 2511.18281).

Nothing here owns a network or draws a random number: see ``modules/unidad.py`` for who calls what, in which order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unidad_pl.checks import check_choices
from unidad_pl.schedules import abar_from_sigma

Weighting = Literal["eps", "edm", "flow"]
Normalizer = Literal["clean", "noisy"]
GANLoss = Literal["bce", "hinge", "lsgan", "wgan"]


def denoising_weight(sigma: Tensor, weighting: Weighting = "edm", sigma_data: float = 0.5) -> Tensor:
    """Weight of the squared x0 error at ``sigma`` [B] -> [B].

    ``eps``: ``sigma^-2``, which makes the loss the plain eps-MSE of eq. 6-7. ``edm``: ``sigma^-2 + sigma_data^-2``
    (Karras et al. 2022; the released FSIG code). ``flow``: ``(1 + 1/sigma)^2``, the plain MSE of
    velocities.

    Raises:
        ValueError: unknown weighting.
    """
    check_choices(weighting=(weighting, Weighting))
    if weighting == "flow":
        return (1 + 1 / sigma) ** 2
    return sigma**-2 if weighting == "eps" else sigma**-2 + sigma_data**-2


def denoising_loss(
    x0_hat: Tensor, x0: Tensor, sigma: Tensor, weighting: Weighting = "edm", sigma_data: float = 0.5
) -> Tensor:
    """``mean(w(sigma) (x0_hat - x0)^2)`` over all elements, eq. 6 (fake score) and eq. 7 (target teacher).

    Args:
        x0_hat: [B, C, H, W] the denoiser's answer at ``x0 + sigma * eps``.
        x0: [B, C, H, W] the clean images.
        sigma: [B].
        weighting: see :func:`denoising_weight`.
        sigma_data: standard deviation of the data, used by ``edm``.

    Returns:
        Scalar.
    """
    weight = denoising_weight(sigma, weighting, sigma_data).view(-1, *[1] * (x0.ndim - 1))
    return (weight * (x0_hat - x0) ** 2).mean()


def dmd_gradient(
    x: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    fake_eps: Tensor,
    teacher_eps: Tensor,
    normalizer: Normalizer = "clean",
    input_scale: Tensor | None = None,
) -> Tensor:
    """The distribution-matching direction of one teacher, eq. 3: ``(F - D_k) / mean_chw |x - D_k|`` per sample.

    The difference is formed in eps-space, where sigma = 80 does not multiply rounding: ``F - D_k = sigma (eps_k -
    eps_F)``.

    Args:
        x: [B, C, H, W] student images.
        noisy: [B, C, H, W] ``x + sigma * eps``, what both networks saw.
        sigma: [B].
        fake_eps: [B, C, H, W] noise estimated by the fake score network.
        teacher_eps: [B, C, H, W] noise estimated by the teacher.
        normalizer: ``clean`` divides by the mean of ``|x - D_k|`` (DMD2, released FSIG code); ``noisy`` by that of
            ``|c * noisy - D_k|`` (released SDP code).
        input_scale: c, [B, 1, 1, 1] what the teacher's input is multiplied by; None: ``1/sqrt(1 + sigma^2)``.

    Returns:
        [B, C, H, W], to be handed to :func:`dmd_loss`.

    Raises:
        ValueError: unknown normalizer.
    """
    check_choices(normalizer=(normalizer, Normalizer))
    s = sigma.view(-1, 1, 1, 1)
    seen = x
    if normalizer == "noisy":
        seen = (abar_from_sigma(s).sqrt() if input_scale is None else input_scale) * noisy
    distance = seen - noisy + s * teacher_eps
    size = distance.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-8)
    return s * (teacher_eps - fake_eps) / size


def dmd_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """``0.5 mean((x - sg(x - g))^2)``: a scalar whose gradient with respect to ``x`` is ``g / numel`` (eq. 4-5)."""
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def _critic_terms(loss: GANLoss) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(loss on real logits, loss on fake logits), elementwise."""
    check_choices(loss=(loss, GANLoss))
    if loss == "bce":
        return lambda real: F.softplus(-real), F.softplus
    if loss == "hinge":
        return lambda real: F.relu(1 - real), lambda fake: F.relu(1 + fake)
    if loss == "lsgan":
        return lambda real: (real - 1) ** 2, lambda fake: fake**2
    return lambda real: -real, lambda fake: fake


def critic_loss(real: Sequence[Tensor], fake: Sequence[Tensor], loss: GANLoss = "bce") -> Tensor:
    """The discriminator's loss, eq. 8: real plus fake term (a sum of two means, not halved), mean over heads.

    Args:
        real: logits of the real images, one tensor [B, ...] per head (one in all for ``mean_logit``).
        fake: logits of the student's images, as many tensors.
        loss: ``bce`` (non-saturating), ``hinge``, ``lsgan`` or ``wgan`` (add :func:`gradient_penalty` for the last).

    Returns:
        Scalar. The paper sums over heads: multiply the weight by the number of heads for that.
    """
    on_real, on_fake = _critic_terms(loss)
    return torch.stack([on_real(r).mean() + on_fake(f).mean() for r, f in zip(real, fake, strict=True)]).mean()


def generator_loss(fake: Sequence[Tensor], loss: GANLoss = "bce") -> Tensor:
    """The student's adversarial loss, eq. 9: the images are to be taken for real ones, mean over heads.

    Args:
        fake: logits of the student's images, one tensor [B, ...] per head.
        loss: as in :func:`critic_loss`; hinge and wgan use ``-mean(logit)``.

    Returns:
        Scalar.
    """
    on_real = _critic_terms("wgan" if loss == "hinge" else loss)[0]
    return torch.stack([on_real(f).mean() for f in fake]).mean()


def _squared_norm_of_gradient(logits: Sequence[Tensor], images: Tensor) -> Tensor:
    """Per sample, of the heads' mean logit: [B]."""
    score = torch.stack([logit.reshape(len(logit), -1).mean(1) for logit in logits]).mean(0).sum()
    (grad,) = torch.autograd.grad(score, images, create_graph=True)
    return grad.flatten(1).pow(2).sum(1)


def r1_penalty(logits: Sequence[Tensor], images: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018): ``0.5 mean |d score / d images|^2`` on real images.

    Args:
        logits: of ``images``, with a graph back to them; one tensor [B, ...] per head.
        images: [B, C, H, W] that require grad.

    Returns:
        Scalar with a graph (second order).
    """
    return 0.5 * _squared_norm_of_gradient(logits, images).mean()


def gradient_penalty(logits: Sequence[Tensor], images: Tensor) -> Tensor:
    """WGAN-GP (Gulrajani et al. 2017): ``mean (|d score / d images| - 1)^2`` on images between real and fake.

    Arguments and result as in :func:`r1_penalty`.
    """
    return ((_squared_norm_of_gradient(logits, images) + 1e-12).sqrt() - 1).pow(2).mean()

"""Every loss against its closed form or against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unidad_pl.losses import (
    GANLoss,
    critic_loss,
    denoising_loss,
    denoising_weight,
    dmd_gradient,
    dmd_loss,
    generator_loss,
    gradient_penalty,
    r1_penalty,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SIGMA = torch.tensor([0.1, 2.0, 80.0], dtype=torch.float64)


def wide(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)


def test_eps_weighting_is_the_plain_eps_mse() -> None:
    x0, eps, eps_hat = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1), noise(3, 2, 4, 4, seed=2)
    x0_hat = x0 + wide(SIGMA) * (eps - eps_hat)  # both describe the same noisy image
    torch.testing.assert_close(denoising_loss(x0_hat, x0, SIGMA, "eps"), ((eps_hat - eps) ** 2).mean())


def test_edm_weighting_by_loop() -> None:
    x0, x0_hat = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    expected = sum((s**-2 + 0.3**-2) * ((b - a) ** 2).mean() for s, a, b in zip(SIGMA, x0, x0_hat, strict=True)) / 3
    torch.testing.assert_close(denoising_loss(x0_hat, x0, SIGMA, "edm", 0.3), expected)
    with pytest.raises(ValueError, match="'snr'"):
        denoising_weight(SIGMA, "snr")  # type: ignore[arg-type]


def test_dmd_loss_has_gradient_g_over_numel() -> None:
    x, g = noise(3, 2, 4, 4).requires_grad_(), noise(3, 2, 4, 4, seed=1)
    loss = dmd_loss(x, g)
    loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g / g.numel())
    torch.testing.assert_close(loss, 0.5 * (g**2).mean())


@pytest.mark.parametrize("normalizer", ["clean", "noisy"])
def test_dmd_gradient_is_the_x0_difference_over_its_normalizer(normalizer: str) -> None:
    x, eps = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    fake, teacher = noise(3, 2, 4, 4, seed=2), noise(3, 2, 4, 4, seed=3)
    noisy = x + wide(SIGMA) * eps
    fake_x0, teacher_x0 = noisy - wide(SIGMA) * fake, noisy - wide(SIGMA) * teacher
    g = dmd_gradient(x, noisy, SIGMA, fake, teacher, normalizer)  # type: ignore[arg-type]
    for i, s in enumerate(SIGMA):
        reference = x[i] if normalizer == "clean" else noisy[i] / (1 + s**2).sqrt()
        expected = (fake_x0[i] - teacher_x0[i]) / (reference - teacher_x0[i]).abs().mean()
        torch.testing.assert_close(g[i], expected)


def test_dmd_gradient_edge_cases() -> None:
    x, eps = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    noisy = x + wide(SIGMA) * eps
    assert (dmd_gradient(x, noisy, SIGMA, eps, eps) == 0).all()  # equal networks: no direction
    still = dmd_gradient(0 * x, wide(SIGMA) * eps, SIGMA, eps, eps)  # and a teacher that answers x itself: 0 / 1e-8
    assert (still == 0).all()
    with pytest.raises(ValueError, match="'best'"):
        dmd_gradient(x, noisy, SIGMA, eps, eps, "best")  # type: ignore[arg-type]


def test_dmd_gradient_keeps_small_differences_at_large_sigma() -> None:
    x, eps, delta = noise(1, 2, 4, 4), noise(1, 2, 4, 4, seed=1), 1e-4
    sigma = torch.tensor([80.0], dtype=torch.float64)
    double = (x, x + 80 * eps, sigma, eps, eps * (1 + delta))
    a, b, c, d, e = (t.float() for t in double)
    exact = dmd_gradient(*double)
    torch.testing.assert_close(
        dmd_gradient(a, b, c, d, e).double(), exact, rtol=0, atol=5e-3 * float(exact.abs().max())
    )


REAL, FAKE = torch.tensor([2.0, -0.5]), torch.tensor([-3.0, 0.5])


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


@pytest.mark.parametrize(
    ("loss", "critic", "generator"),
    [
        ("bce", (softplus(-2) + softplus(0.5) + softplus(-3) + softplus(0.5)) / 2, (softplus(3) + softplus(-0.5)) / 2),
        ("hinge", (0 + 1.5 + 0 + 1.5) / 2, (3 - 0.5) / 2),
        ("lsgan", (1 + 2.25 + 9 + 0.25) / 2, (16 + 0.25) / 2),
        ("wgan", (-2 + 0.5 - 3 + 0.5) / 2, (3 - 0.5) / 2),
    ],
)
def test_gan_losses_by_hand(loss: GANLoss, critic: float, generator: float) -> None:
    assert critic_loss([REAL], [FAKE], loss).item() == pytest.approx(critic, rel=1e-6)
    assert generator_loss([FAKE], loss).item() == pytest.approx(generator, rel=1e-6)


def test_gan_losses_are_means_over_heads_of_any_shape() -> None:
    heads_real, heads_fake = [noise(2), noise(2, 3, 3, seed=1)], [noise(2, seed=2), noise(2, 3, 3, seed=3)]
    one = [critic_loss([r], [f], "bce") for r, f in zip(heads_real, heads_fake, strict=True)]
    torch.testing.assert_close(critic_loss(heads_real, heads_fake, "bce"), (one[0] + one[1]) / 2)
    both = (generator_loss(heads_fake[:1]) + generator_loss(heads_fake[1:])) / 2
    torch.testing.assert_close(generator_loss(heads_fake), both)


def test_gan_loss_errors() -> None:
    with pytest.raises(ValueError, match="'ragan'"):
        critic_loss([REAL], [FAKE], "ragan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'ragan'"):
        generator_loss([FAKE], "ragan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="zip"):
        critic_loss([REAL, REAL], [FAKE])


def test_penalties_of_a_linear_critic() -> None:
    images, w = noise(3, 2, 4, 4).requires_grad_(), noise(2, 4, 4, seed=1)
    logits = [(images * w).sum((1, 2, 3)), (images * w).sum((1, 2, 3)) * 3]  # mean logit: slope 2 w
    norm = 2 * w.norm()
    torch.testing.assert_close(r1_penalty(logits, images), 0.5 * norm**2)
    torch.testing.assert_close(gradient_penalty(logits, images), (norm - 1) ** 2)


def test_penalties_of_a_quadratic_critic_and_their_gradient() -> None:
    images, a = noise(3, 2, 4, 4).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    norms = images.detach().flatten(1).norm(dim=1)  # logit a/2 |x|^2: slope a x

    r1 = r1_penalty([a / 2 * images.flatten(1).pow(2).sum(1)], images)
    torch.testing.assert_close(r1.detach(), 0.5 * (0.7 * norms).pow(2).mean())
    torch.testing.assert_close(torch.autograd.grad(r1, a)[0], 0.7 * norms.pow(2).mean())

    gp = gradient_penalty([a / 2 * images.flatten(1).pow(2).sum(1)], images)
    torch.testing.assert_close(gp.detach(), (0.7 * norms - 1).pow(2).mean())
    torch.testing.assert_close(torch.autograd.grad(gp, a)[0], (2 * (0.7 * norms - 1) * norms).mean())


def test_penalties_of_patch_logits_use_the_mean_per_image() -> None:
    images = noise(2, 1, 4, 4).requires_grad_()
    torch.testing.assert_close(r1_penalty([images[:, 0]], images), torch.tensor(0.5 / 16, dtype=torch.float64))

"""From noise to images: the few-step student, and Heun / DDIM for many-step teachers.

Every sampler takes ``noise``: a function that returns a fresh Gaussian [B, C, H, W] each time it is called. Training
passes :func:`random_noise`; evaluation passes :func:`seeded_noise`, where row i comes from the generator of seed i, so
that an image does not depend on the batch, the rank or the device it is drawn on.

    >>> from unidad_pl import NewUNet
    >>> from unidad_pl.schedules import log_linear
    >>> student = NewUNet(channels=(32,), attention_levels=()).build()
    >>> noise = seeded_noise([17, 18], student.image_shape, "cpu")
    >>> images = FewStepSampler(log_linear(3))(student, noise)  # [2, 3, 32, 32]
    >>> images = heun(student, noise, sampling_sigmas(4))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unidad_pl.checks import check_arguments, check_choices, check_whole
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Denoiser
from unidad_pl.schedules import MOST_STEPS, karras

Noise = Callable[[], Tensor]
GradientMode = Literal["unroll", "last", "backward_simulation"]


def as_seeds(seeds: Tensor | Sequence[int]) -> Tensor:
    """Seeds as int64 [B].

    Raises:
        ValueError: there are none, or they are no whole numbers.
    """
    found = torch.as_tensor(seeds)
    if not len(found):
        raise ValueError("no seeds: give one for each image")
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"seeds must be whole numbers, got {found.dtype}")
    return found.long()


def seeded_noise(seeds: Tensor | Sequence[int], shape: Sequence[int], device: torch.device | str) -> Noise:
    """Noise whose row i is drawn by a CPU generator seeded with ``seeds[i]``.

    Args:
        seeds: B integers >= 0.
        shape: (C, H, W) of one image.
        device: where the noise is moved to.
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return lambda: torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)


def random_noise(batch: int, shape: Sequence[int], device: torch.device | str) -> Noise:
    """Noise ``[batch, *shape]`` from torch's global random state on ``device``."""
    return lambda: torch.randn(batch, *shape, device=device)


class FewStepSampler:
    """The student's sampler: ``x = sigma_0 z``; then K times ``x0 = G(x, sigma_k)``, re-noised in between.

        >>> FewStepSampler(torch.tensor([0.5, 80.0]))
        Traceback (most recent call last):
        ...
        ValueError: few-step sigmas must be positive and descend, got [0.5, 80.0]

    Args:
        sigmas: [K] descending, see :func:`~unidad_pl.schedules.log_linear`.
        gradient: which applications carry gradient: ``unroll`` all K (released code), ``last`` the last one,
            ``backward_simulation`` (DMD2) the one the caller names, where sampling then stops.
        checkpoint: compute applications that carry gradient again in the backward pass instead of keeping what they
            computed: less memory, a quarter to a third more time.
        standard: nobody chose these sigmas: where a network has steps of its own, :meth:`fitted_to` takes those.

    Raises:
        ValueError: no sigmas, sigmas that are not finite or do not descend, or an unknown gradient mode.
    """

    def __init__(
        self, sigmas: Tensor, gradient: GradientMode = "unroll", checkpoint: bool = False, standard: bool = False
    ) -> None:
        check_choices(gradient=(gradient, GradientMode))
        check_arguments(FewStepSampler.__init__, {"checkpoint": checkpoint, "standard": standard})
        if sigmas.ndim != 1 or not 1 <= len(sigmas) <= MOST_STEPS:
            raise ValueError(
                f"few-step sigmas must be 1 to {MOST_STEPS} positive numbers, got the shape {list(sigmas.shape)}"
            )
        if not sigmas.isfinite().all() or (sigmas <= 0).any() or (sigmas.diff() >= 0).any():
            raise ValueError(f"few-step sigmas must be positive and descend, got {sigmas.tolist()}")
        self.sigmas = [float(s) for s in sigmas]
        self.gradient, self.checkpoint, self.standard = gradient, checkpoint, standard

    def __len__(self) -> int:
        return len(self.sigmas)

    def fitted_to(self, network: Denoiser) -> FewStepSampler:
        """The same sampler at the sigmas that ``network`` can be sampled at."""
        own = network.own_sigmas(len(self)) if self.standard else None
        sigmas = torch.tensor(own or network.trained_sigmas(self.sigmas), dtype=torch.float64)
        return FewStepSampler(sigmas, self.gradient, self.checkpoint, self.standard)

    def __call__(
        self, student: Denoiser, noise: Noise, cond: Condition | None = None, stop: int | None = None
    ) -> Tensor:
        """Images [B, C, H, W], not clamped.

        Args:
            student: the denoiser G.
            noise: called once per step, the initial z included.
            cond: condition of the B rows.
            stop: the step whose output is returned (0-based); the last one by default. ``backward_simulation``
                training draws it.
        """
        last = len(self) - 1 if stop is None else stop
        x0, x = torch.zeros(()), student.init_noise_sigma(self.sigmas[0]) * noise()
        for k in range(last + 1):
            if k > 0:
                x = x0 + self.sigmas[k] * noise()
            with torch.set_grad_enabled(torch.is_grad_enabled() and (self.gradient == "unroll" or k == last)):
                x0 = self._apply(student, x, x.new_full((len(x),), self.sigmas[k]), cond)
            if not x0.requires_grad:  # torch reuses autocast's casts made without a graph
                torch.clear_autocast_cache()
        return x0

    def _apply(self, student: Denoiser, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        if not (self.checkpoint and torch.is_grad_enabled()):
            return student(x, sigma, cond)
        x0: Tensor = checkpoint(student, x, sigma, cond, use_reentrant=False)
        return x0


def sampling_sigmas(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """The Karras grid of many-step samplers, [num_steps + 1], descending to 0 (Karras et al. 2022, eq. 5).

    Raises:
        ValueError: a number that makes no sense; names it.
    """
    check_whole(1, MOST_STEPS, num_steps=num_steps)
    return torch.cat([karras(num_steps, sigma_min, sigma_max, rho).flip(0), torch.zeros(1)])


def heun(denoiser: Denoiser, noise: Noise, sigmas: Tensor, cond: Condition | None = None) -> Tensor:
    """Heun's second-order sampler (Karras et al. 2022, algorithm 1), deterministic after the first draw.

    Args:
        denoiser: evaluated twice per step except the last.
        noise: called once.
        sigmas: [n + 1] descending to 0, see :func:`sampling_sigmas`.
        cond: condition of the B rows.

    Returns:
        Images [B, C, H, W], not clamped.
    """
    x = float(sigmas[0]) * noise()
    for now, after in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        slope = (x - denoiser(x, x.new_full((len(x),), now), cond)) / now
        euler = x + (after - now) * slope
        if after > 0:
            slope_after = (euler - denoiser(euler, x.new_full((len(x),), after), cond)) / after
            x = x + (after - now) * 0.5 * (slope + slope_after)
        else:
            x = euler
    return x


def ddim(denoiser: Denoiser, noise: Noise, sigmas: Tensor, cond: Condition | None = None) -> Tensor:
    """Deterministic DDIM (Song et al. 2021): in sigma space, ``x <- x0 + sigma_next * eps``.

    Arguments and result as :func:`heun`.
    """
    x = float(sigmas[0]) * noise()
    for now, after in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        guess = denoiser.predict(x, x.new_full((len(x),), now), cond)
        x = guess.x0 + after * guess.eps
    return x

"""Sampling any network of a module as the many-step diffusion model it is: what a teacher has to teach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unidad_pl.condition import Condition
from unidad_pl.sampling import heun, sampling_sigmas, seeded_noise


@torch.no_grad()
def in_many_steps(module: Any, name: str, seeds: Tensor, num_steps: int) -> Tensor:
    """Draw ``seeds`` with a network of ``module`` by Heun's method; the noise of a seed is that of the student's first.

    Args:
        module: a :class:`~unidad_pl.training.module.GenerativeModule`; its networks are built if they are not.
        name: one of its denoisers: ``source_teacher``, ``target_teacher``, ``fake_score``, ...
        seeds: [B]; a class-conditional model draws its classes in turn, seed 0 the first.
        num_steps: sampling steps, each of two evaluations but the last.

    Returns:
        Pictures [B, C, H, W], clamped to [-1, 1].

    Raises:
        ValueError: the module has no such network, or one that needs prompts.
    """
    module.configure_model()
    networks = module.denoisers()
    if name not in networks:
        raise ValueError(f"this {type(module).__name__} has no network {name!r}: it has {', '.join(networks)}")
    network = networks[name]
    if network.takes_prompts:
        raise ValueError(
            f"{name} is a text-to-image model, and seeds alone do not say what to draw: leave TeacherGrid out, "
            f"PromptGrid shows the student's pictures of every prompt"
        )
    device = next(network.parameters()).device
    cond = Condition.of(module.labels.of_seeds(seeds.to(device)))
    training = network.training
    network.eval()
    images = heun(network, seeded_noise(seeds, network.image_shape, device), sampling_sigmas(num_steps), cond)
    network.train(training)
    return module.codec.decode(images.to(module.device)).clamp(-1, 1)

"""Optimiser settings of one group of parameters, and what the manual optimisation needs around them."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from unidad_pl.sharding import is_sliced, local


@dataclass
class Optimization:
    """Optimiser of one group of parameters, its warm-up, decay and clipping; all counted in its OWN steps.

    Attributes:
        lr: peak learning rate.
        betas: Adam's moment decays.
        weight_decay: decoupled weight decay.
        warmup: steps over which the rate rises linearly; the first step uses ``lr / warmup``. 0: none.
        decay_to: fraction of ``lr`` reached at the last step of the run, along a half cosine. 1: constant.
        decay_from: fraction of the run after which the decay begins. A run stopped before that point can be resumed
            with another ``max_steps``: nothing it did so far depended on it.
        clip: largest gradient norm of the group; 0: no clipping.
        optimizer: class path of the optimiser, called with ``lr``, ``betas`` and ``weight_decay``.
        options: further keyword arguments for it, e.g. ``{fused: true}``.
    """

    lr: float = 2e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup: int = 500
    decay_to: float = 1.0
    decay_from: float = 0.0
    clip: float = 10.0
    optimizer: str = "torch.optim.AdamW"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.lr, self.weight_decay, self.warmup, self.decay_to, self.clip) < 0 or not 0 <= self.decay_from <= 1:
            raise ValueError(f"optimisation settings must be >= 0 and decay_from at most 1, got {self}")
        if "." not in self.optimizer:
            raise ValueError(f"optimizer must be a full class path such as torch.optim.AdamW, got {self.optimizer!r}")

    def build(self, parameters: Any, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimiser over ``parameters`` and its schedule for ``total_steps`` of its own steps.

        Raises:
            ValueError: there is no such optimiser; names the package to install.
        """
        module, _, name = self.optimizer.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            package = module.partition(".")[0]
            raise ValueError(f"optimizer {self.optimizer}: {error}; pip install {package}") from error
        except AttributeError as error:
            raise ValueError(f"there is no optimizer {self.optimizer}: {error}") from error
        optimizer = kind(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, **self.options)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, total_steps))

    def factor(self, step: int, total_steps: int) -> float:
        """Multiple of ``lr`` used by step number ``step`` (0-based)."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        start = self.decay_from * (total_steps - 1)
        progress = min(1.0, max(0.0, step - start) / max(1.0, total_steps - 1 - start))
        return warm * (self.decay_to + (1 - self.decay_to) * 0.5 * (1 + math.cos(math.pi * progress)))


def content_hash(module: nn.Module, names: Collection[str] | None = None) -> str:
    """sha256 over names, shapes and float32 bytes of a module's parameters and buffers, or of those in ``names``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if names is not None and name not in names:
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def trained(*networks: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``networks`` that an optimiser steps: all but the base under adapters."""
    return [p for network in networks for p in network.parameters() if p.requires_grad]


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No gradient reaches the parameters of ``modules`` inside; every flag is restored exactly afterwards."""
    held = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


def check_choices(**choices: tuple[object, tuple[str, ...]]) -> None:
    """Refuse unknown options by name: ``check_choices(loss=(loss, ("bce", "hinge")))``.

    Raises:
        ValueError: the first value that is not among its choices; names option, value and choices.
    """
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their mean over all ranks: one all-reduce per dtype. Nothing on a single process.

    Gradients of sliced parameters are left alone: the backward pass has averaged them.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    grads = [p.grad for p in parameters if p.grad is not None and not is_sliced(p)]
    for dtype in {g.dtype for g in grads}:
        same = [g for g in grads if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in same])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for g, part in zip(same, flat.split([g.numel() for g in same]), strict=True):
            g.copy_(part.view_as(g))


def spoil_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> None:
    """Make a gradient non-finite where its loss is, so that the average over ranks tells every rank to skip the step.

    Nothing is read back from the device, and a finite loss changes no gradient.
    """
    grads = (local(p.grad) for p in parameters if p.grad is not None)
    grad = next((grad for grad in grads if grad.numel()), None)
    if grad is not None:
        grad[(0,) * grad.ndim] += (loss.detach() * 0).to(grad.dtype)

"""Optimiser settings of one group of parameters: algorithm, warm-up, decay and clipping."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from unidad_pl.checks import check_at_least, check_options, check_whole


@dataclass
class OptimizerOptions:
    """Optimiser of one group of parameters and its learning rate; all counted in its OWN updates.

        >>> options = OptimizerOptions(lr=0.1, algorithm="torch.optim.SGD", arguments={"momentum": 0.9}, warmup=4)
        >>> optimizer, schedule = options.build([torch.nn.Parameter(torch.zeros(2))], total_updates=100)
        >>> schedule.get_last_lr()
        [0.025]

    Attributes:
        lr: peak learning rate.
        algorithm: class path of the optimiser; called with the parameters, ``lr`` and ``arguments``.
        arguments: its own arguments, e.g. ``{betas: [0.9, 0.99], fused: true}``; what is left out has its default there
            (AdamW's: betas 0.9 and 0.999, weight decay 0.01).
        warmup: updates over which the rate rises linearly; the first one uses ``lr / warmup``. 0: none.
        decay_to: fraction of ``lr`` reached at the last update of the run, along a half cosine. 1: constant.
        decay_from: fraction of the run after which the decay begins. A run stopped before that point can be resumed
            with another ``max_steps``: nothing it did so far depended on it.
        clip: largest gradient norm of the group; 0: no clipping.
    """

    lr: float = 2e-6
    algorithm: str = "torch.optim.AdamW"
    arguments: dict[str, Any] = field(default_factory=dict)
    warmup: int = 500
    decay_to: float = 1.0
    decay_from: float = 0.0
    clip: float = 10.0

    def __post_init__(self) -> None:
        check_at_least(0, lr=self.lr, decay_to=self.decay_to, clip=self.clip)
        check_at_least(0, 1, decay_from=self.decay_from)
        check_whole(0, warmup=self.warmup)
        check_options(self)
        if not isinstance(self.arguments, Mapping):
            raise ValueError(f"arguments must be names and values, e.g. {{fused: true}}, got {self.arguments!r}")
        for name, value in self.arguments.items():
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(one, float) and not math.isfinite(one):
                    raise ValueError(f"optimizer.arguments.{name} must be finite, got {value!r}")
        if "." not in self.algorithm:
            raise ValueError(f"algorithm must be a full class path such as torch.optim.AdamW, got {self.algorithm!r}")

    def build(self, parameters: Any, total_updates: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimiser over ``parameters`` and its schedule for ``total_updates`` of its own updates.

        Raises:
            ValueError: there is no such optimiser (names the package to install), it has no such argument, or it cannot
                step as modules step it: with dense gradients and without a closure.
        """
        parameters = list(parameters)
        kind = self._kind()
        known = inspect.signature(kind).parameters
        unknown = [name for name in self.arguments if name not in known]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise ValueError(
                f"optimizer.arguments: {self.algorithm} has no argument {', '.join(unknown)}, only {', '.join(known)}"
            )
        if own := {"lr", "params"} & set(self.arguments):
            raise ValueError(f"optimizer.arguments.{own.pop()} is given already: the rate is optimizer.lr")
        try:
            optimizer = kind(parameters, lr=self.lr, **self.arguments)
            self._try_out(kind, optimizer)
        except Exception as error:
            given = ", ".join(f"{name}: {value!r}" for name, value in self.arguments.items())
            raise ValueError(
                f"optimizer.algorithm {self.algorithm} with optimizer.arguments {{{given}}} cannot be used: {error}. "
                f"It must take dense gradients and step without a closure"
            ) from error
        return optimizer, LambdaLR(optimizer, lambda update: self.factor(update, total_updates))

    def _try_out(self, kind: Any, optimizer: torch.optim.Optimizer) -> None:
        """One step of a small parameter: some optimisers refuse only then, after a run has been set up."""
        device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
        probe = torch.nn.Parameter(torch.zeros(2, 2, device=device))
        probe.grad = torch.ones_like(probe)
        kind([probe], lr=self.lr, **self.arguments).step()

    def _kind(self) -> Any:
        module, _, name = self.algorithm.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            package = module.partition(".")[0]
            raise ValueError(f"optimizer {self.algorithm}: {error}; pip install {package}") from error
        except AttributeError as error:
            raise ValueError(f"there is no optimizer {self.algorithm}: {error}") from error
        except (ImportError, ValueError, TypeError) as error:
            raise ValueError(f"optimizer.algorithm {self.algorithm!r} cannot be imported: {error}") from error
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise ValueError(f"optimizer.algorithm {self.algorithm} is no torch.optim.Optimizer, but {kind!r:.100}")
        return kind

    def factor(self, update: int, total_updates: int) -> float:
        """Multiple of ``lr`` used by update number ``update`` (0-based)."""
        warm = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        start = self.decay_from * (total_updates - 1)
        progress = min(1.0, max(0.0, update - start) / max(1.0, total_updates - 1 - start))
        return warm * (self.decay_to + (1 - self.decay_to) * 0.5 * (1 + math.cos(math.pi * progress)))

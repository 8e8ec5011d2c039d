"""Lightning's DDP processes without its wrapper, for modules that step several optimisers by hand."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from unidad_pl.strategies.failures import FailFastStrategy

NAME = "unidad_ddp"


def tensors_elsewhere(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Parameters and buffers that are not on ``device``, by name: those of a teacher or average kept on the CPU."""
    every = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in every.items() if tensor.device != device}


def take_from_rank_0(tensor: Tensor, device: torch.device) -> None:
    """Rank 0's values in place of those of ``tensor``, by way of ``device``, whose group may know no other kind."""
    held = tensor.detach().to(device)
    dist.broadcast(held, 0)
    tensor.detach().copy_(held)


class ManualDDPStrategy(FailFastStrategy, DDPStrategy):
    """``ddp`` that leaves the module unwrapped: ``GenerativeModule`` averages gradients itself.

        >>> from datetime import timedelta
        >>> strategy = ManualDDPStrategy(timeout=timedelta(minutes=10))  # for pl.Trainer(strategy=strategy)

    DistributedDataParallel expects every parameter in every backward pass; with three optimisers each backward has
    its own parameters. Here one flat all-reduce per optimiser step moves that group's gradients and nothing else.
    Registered as ``unidad_ddp``. Takes the arguments of ``DDPStrategy``; ``timeout`` is how long a rank waits for the
    others before the job ends.
    """

    strategy_name = NAME

    def configure_ddp(self) -> None:
        model: Any = self.model
        elsewhere = tensors_elsewhere(model, self.root_device)
        ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
        model._ddp_params_and_buffers_to_ignore = [*ignored, *elsewhere]
        _sync_module_states(model)
        model._ddp_params_and_buffers_to_ignore = ignored  # another fit may have them elsewhere
        for name, tensor in elsewhere.items():  # in one order on all ranks
            if name not in ignored:
                take_from_rank_0(tensor, self.root_device)

    def block_backward_sync(self) -> Any:
        """Nothing to block: gradients are only exchanged in the module's own ``step``."""
        return nullcontext()

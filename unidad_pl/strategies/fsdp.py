"""FSDP2 for networks that do not fit: every rank keeps a shard of each weight, gradient, average and optimiser state.

A checkpoint is the same single file as without: it is resumed on any number of ranks, with this strategy or another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from unidad_pl.strategies.failures import FailFastStrategy

NAME = "unidad_fsdp"
METHODS = ("predict", "taps")
"""What is called on a network besides ``forward``, and needs its weights."""


class ShardedStrategy(FailFastStrategy, ModelParallelStrategy):
    """``model_parallel`` over all ranks, without tensor parallelism, with one file per checkpoint.

        >>> strategy = ShardedStrategy(timeout=timedelta(minutes=10))  # for pl.Trainer(strategy=strategy)

    :class:`~unidad_pl.training.module.GenerativeModule` shards its networks with :func:`shard`. Registered as
    ``unidad_fsdp``.

    Args:
        timeout: how long a rank waits for the others before the job ends.
        process_group_backend: ``nccl`` or ``gloo``; default what the device needs.
    """

    strategy_name = NAME

    def __init__(self, timeout: timedelta = timedelta(minutes=30), process_group_backend: str | None = None) -> None:
        super().__init__(1, 1, False, process_group_backend, timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Full tensors on rank 0; only names, on the others. What a checkpoint does not keep is not gathered."""
        assert self.lightning_module is not None
        unsaved = self.lightning_module.unsaved_weights()  # type: ignore[operator]
        weights = self.lightning_module.state_dict()
        return {name: value if name in unsaved else self._gathered(value) for name, value in weights.items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        weights = {name: shard_like(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(weights, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As ``optimizer.state_dict()`` is without shards; on rank 0."""
        content = getattr(optimizer, "optimizer", optimizer).state_dict()
        state = {
            number: {name: self._gathered(value) for name, value in values.items()}
            for number, values in content["state"].items()
        }
        return content | {"state": state}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, content in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: shard_like(value, parameters[number]) for name, value in values.items()}
                for number, values in content["state"].items()
            }
            optimizer.load_state_dict(content | {"state": state})

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads the file."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def _gathered(self, value: Any) -> Any:
        if not is_sharded(value):
            return value
        gathered = full(value)
        return gathered.cpu() if self.is_global_zero else gathered.new_empty(0)


def shard(network: nn.Module, mesh: Any) -> None:
    """Shard the parameters of ``network`` over the ranks of ``mesh``, in place, frozen ones too.

    Its blocks (what its outermost ``ModuleList`` and ``ModuleDict`` hold) are gathered one at a time, around their
    forward and backward passes. What it names as ``apart`` is used outside of the block it lies in, and gathered alone.

    Raises:
        RuntimeError: torch is older than 2.6.
    """
    try:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError as error:
        raise RuntimeError(f"{NAME} needs torch >= 2.6, this is {torch.__version__}: use unidad_ddp") from error
    for block in (*getattr(network, "apart", ()), *_blocks(network)):  # inner ones first
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # Shards again after every pass, for the root too: a parameter that is frozen meanwhile must be seen as frozen.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    for method in METHODS:
        if hasattr(network, method):
            register_fsdp_forward_method(network, method)


def _blocks(module: nn.Module) -> Iterable[nn.Module]:
    lists = (nn.ModuleList, nn.ModuleDict)
    for child in module.children():
        if isinstance(module, lists) and not isinstance(child, lists):
            yield child
        else:
            yield from _blocks(child)


def is_sharded(value: Any) -> bool:
    """Whether a tensor is spread over ranks (a ``DTensor``, which older torch has elsewhere)."""
    return hasattr(value, "full_tensor")


def full(value: Any) -> Any:
    """The full tensor of a sharded one, gathered on every rank; anything else as it is."""
    return value.full_tensor() if is_sharded(value) else value


def local_shard(value: Any) -> Any:
    """The part of a tensor that lies on this rank."""
    return value.to_local() if is_sharded(value) else value


def shard_like(value: Any, like: Tensor | None) -> Any:
    """The local shard of a full tensor, sharded as ``like`` is; anything that is not of its shape, as it is."""
    mismatch = not isinstance(value, Tensor) or like is None or value.shape != like.shape
    if mismatch or is_sharded(value) or not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    target: Any = like
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)

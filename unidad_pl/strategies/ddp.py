"""Lightning's DDP processes without its wrapper, for modules that step several optimisers by hand."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy

from unidad_pl.strategies.failures import FailFastStrategy

NAME = "unidad_ddp"


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
        assert self.model is not None
        _sync_module_states(self.model)

    def block_backward_sync(self) -> Any:
        """Nothing to block: gradients are only exchanged in the module's own ``step``."""
        return nullcontext()

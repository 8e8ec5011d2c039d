"""Lightning's DDP processes without its wrapper, for modules that step several optimisers by hand."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

NAME = "unidad_ddp"


class UnwrappedDDPStrategy(DDPStrategy):
    """``ddp`` that leaves the module unwrapped: :class:`~unidad_pl.modules.base.GenerativeModule` averages gradients.

    DistributedDataParallel expects every parameter in every backward pass; with three optimisers each backward has
    its own parameters. Here one flat all-reduce per optimiser step moves that group's gradients and nothing else.
    Registered as ``unidad_ddp``.
    """

    strategy_name = NAME

    def configure_ddp(self) -> None:
        assert self.model is not None
        _sync_module_states(self.model)

    def block_backward_sync(self) -> Any:
        """Nothing to block: gradients are only exchanged in the module's own ``step``."""
        return nullcontext()


def register() -> None:
    """Make ``strategy="unidad_ddp"`` known to Lightning; done on import of :mod:`unidad_pl.modules`."""
    if NAME not in StrategyRegistry:
        StrategyRegistry.register(
            NAME, UnwrappedDDPStrategy, description=(UnwrappedDDPStrategy.__doc__ or "").split("\n")[0]
        )

"""Lightning's DDP processes without its wrapper, for modules that step several optimisers by hand."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

NAME = "unidad_ddp"


class UnwrappedDDPStrategy(DDPStrategy):
    """``ddp`` that leaves the module unwrapped: :class:`~unidad_pl.modules.base.GenerativeModule` averages gradients.

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

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Rank 0 writes; where it cannot, every rank raises, so that none waits for it.

        Raises:
            OSError: as rank 0 saw it.
        """
        failure: OSError | None = None
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except OSError as error:
            failure = error
        failure = self.broadcast(failure)
        if failure is not None:
            raise failure


def register() -> None:
    """Make ``strategy="unidad_ddp"`` known to Lightning; done on import of :mod:`unidad_pl.modules`."""
    if NAME not in StrategyRegistry:
        StrategyRegistry.register(
            NAME, UnwrappedDDPStrategy, description=(UnwrappedDDPStrategy.__doc__ or "").split("\n")[0]
        )

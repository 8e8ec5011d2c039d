"""How processes work together on one module: ``unidad_ddp`` and ``unidad_fsdp``, for ``--trainer.strategy``."""

from lightning.pytorch.strategies import StrategyRegistry

from unidad_pl.strategies.ddp import ManualDDPStrategy
from unidad_pl.strategies.fsdp import ShardedStrategy

__all__ = ["ManualDDPStrategy", "ShardedStrategy"]

for _strategy in (ManualDDPStrategy, ShardedStrategy):
    if _strategy.strategy_name not in StrategyRegistry:
        StrategyRegistry.register(
            _strategy.strategy_name, _strategy, description=(_strategy.__doc__ or "").partition("\n")[0]
        )

"""LightningModules: the method, and plain diffusion training."""

from unidad_pl import sharding as _sharding  # registers the strategies
from unidad_pl.discriminator import Critic
from unidad_pl.modules.base import GenerativeModule
from unidad_pl.modules.diffusion import Diffusion
from unidad_pl.modules.frozen import Memory
from unidad_pl.modules.optimization import Optimization
from unidad_pl.modules.unidad import UniDAD

_sharding.register()

__all__ = ["Critic", "Diffusion", "GenerativeModule", "Memory", "Optimization", "UniDAD"]

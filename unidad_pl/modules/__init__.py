"""LightningModules: the method, and plain diffusion training; what configs set of them is in ``options``."""

from unidad_pl.modules.diffusion import Diffusion
from unidad_pl.modules.unidad import UniDAD

__all__ = ["Diffusion", "UniDAD"]

"""The LightningModules."""

from unidad_pl.modules.base import GenerativeModule, Optimization
from unidad_pl.modules.diffusion import Diffusion

__all__ = ["Diffusion", "GenerativeModule", "Optimization"]

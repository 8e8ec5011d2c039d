"""The embedded world: procedural portraits that need no download, and the network that judges them."""

from unidad_pl.cartoons.features import CartoonFeatures

__all__ = ["CartoonFeatures"]

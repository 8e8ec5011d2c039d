"""Images in: folders, the cartoon world, and the DataModules that serve them."""

from unidad_pl.data.batch import Batch
from unidad_pl.data.few_shot import FewShotDataModule

__all__ = ["Batch", "FewShotDataModule"]

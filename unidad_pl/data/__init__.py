"""Images in: folders, the cartoon world, and the DataModules that serve them."""

from unidad_pl.data.batch import Batch
from unidad_pl.data.few_shot import FewShotDataModule
from unidad_pl.data.subject import SubjectDataModule

__all__ = ["Batch", "FewShotDataModule", "SubjectDataModule"]

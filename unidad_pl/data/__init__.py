"""Images in: folders, archives, datasets, the cartoon world, and the DataModules that serve them."""

from unidad_pl.data.batch import Batch
from unidad_pl.data.few_shot import Augmentation, Evaluation, FewShotDataModule, Reference
from unidad_pl.data.subject import Prior, PromptOptions, SubjectDataModule, SubjectEvaluation

__all__ = [
    "Augmentation", "Batch", "Evaluation", "FewShotDataModule", "Prior", "PromptOptions", "Reference",
    "SubjectDataModule", "SubjectEvaluation",
]  # fmt: skip

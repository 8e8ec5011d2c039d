"""Uni-DAD in PyTorch Lightning: few-step, few-shot image generation (arXiv 2511.18281).

Names are loaded when they are first used: ``import unidad_pl`` needs neither torch nor a second.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

_ROOMS = {
    "backbones": ("ADMSource", "LoRA", "NewUNet", "PretrainedUNet", "StableDiffusion", "Transformer"),
    "callbacks": (
        "CMMD", "FID", "AttributeShare", "Cost", "FactorDistance", "IntraLPIPS", "LossBalance", "PredictionWriter",
        "Preemption", "PromptDiversity", "PromptGrid", "SampleGrid", "SoundCheckpoint", "SubjectSimilarity",
        "TeacherGrid",
    ),
    "cartoons": ("CartoonFeatures",),
    "data": (
        "Augmentation", "Evaluation", "FewShotDataModule", "Prior", "PromptOptions", "Reference", "SubjectDataModule",
        "SubjectEvaluation",
    ),
    "condition": ("Condition",),
    "data.batch": ("Batch",),
    "denoiser": ("Denoiser", "DenoiserSource"),
    "export": ("export_student", "load_export"),
    "modules": ("Diffusion", "UniDAD"),
    "modules.diffusion": ("ExportOptions", "LogNormal", "SamplingOptions"),
    "modules.options": (
        "AdaptationOptions", "DenoisingOptions", "FakeScoreOptions", "GANOptions", "MatchingOptions", "StudentOptions",
        "TargetTeacherOptions",
    ),
    "runs": ("TrainedStudent", "load_student"),
    "sampling": ("FewStepSampler",),
    "strategies": ("ManualDDPStrategy", "ShardedStrategy"),
    "training": ("GenerativeModule", "MemoryOptions", "OptimizerOptions", "TrainingOptions"),
}  # fmt: skip
"""Where each public name lives."""
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [*sorted(_HOMES), "__version__"]  # noqa: PLE0604 (names)
__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("unidad_pl")
    if name not in _HOMES:
        raise AttributeError(f"module 'unidad_pl' has no attribute {name!r}")
    return getattr(import_module(f"unidad_pl.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

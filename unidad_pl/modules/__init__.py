"""LightningModules: the method, and plain diffusion training."""

from unidad_pl.modules.diffusion import Diffusion, ExportOptions, LogNormal, SamplingOptions
from unidad_pl.modules.options import (
    AdaptationOptions,
    DenoisingOptions,
    FakeScoreOptions,
    GANOptions,
    MatchingOptions,
    StudentOptions,
    TargetTeacherOptions,
)
from unidad_pl.modules.unidad import UniDAD

__all__ = [
    "AdaptationOptions",
    "DenoisingOptions",
    "Diffusion",
    "ExportOptions",
    "FakeScoreOptions",
    "GANOptions",
    "LogNormal",
    "MatchingOptions",
    "SamplingOptions",
    "StudentOptions",
    "TargetTeacherOptions",
    "UniDAD",
]

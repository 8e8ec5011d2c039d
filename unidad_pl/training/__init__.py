"""What generative modules share: networks and their memory, manual optimisation, micro-batches, resuming."""

from unidad_pl.training.hparams import TrainingOptions
from unidad_pl.training.module import GenerativeModule
from unidad_pl.training.networks import MemoryOptions
from unidad_pl.training.optimization import OptimizerOptions

__all__ = ["GenerativeModule", "MemoryOptions", "OptimizerOptions", "TrainingOptions"]

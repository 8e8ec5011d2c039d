"""Lightning callbacks: metrics, pictures and records of what a module generates; usable in any Lightning project."""

from unidad_pl.callbacks.attributes import AttributeShare
from unidad_pl.callbacks.balance import LossBalance
from unidad_pl.callbacks.base import EvaluationCallback, Report
from unidad_pl.callbacks.cmmd import CMMD
from unidad_pl.callbacks.cost import Cost
from unidad_pl.callbacks.factors import FactorDistance
from unidad_pl.callbacks.fid import FID
from unidad_pl.callbacks.intra_lpips import IntraLPIPS
from unidad_pl.callbacks.prediction_writer import PredictionWriter
from unidad_pl.callbacks.preemption import Preemption
from unidad_pl.callbacks.prompt_grid import PromptGrid
from unidad_pl.callbacks.records import read_records
from unidad_pl.callbacks.sample_grid import SampleGrid
from unidad_pl.callbacks.similarity import PromptDiversity, SubjectSimilarity
from unidad_pl.callbacks.sound_checkpoint import SoundCheckpoint
from unidad_pl.callbacks.teacher_grid import TeacherGrid

__all__ = [
    "CMMD", "FID", "AttributeShare", "Cost", "EvaluationCallback", "FactorDistance", "IntraLPIPS", "LossBalance",
    "PredictionWriter", "Preemption", "PromptDiversity", "PromptGrid", "Report", "SampleGrid", "SoundCheckpoint",
    "SubjectSimilarity", "TeacherGrid", "read_records",
]  # fmt: skip

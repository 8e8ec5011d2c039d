"""From a run folder back to its checkpoints, its config, and the student it trained."""

from unidad_pl.runs.student import TrainedStudent, load_student

__all__ = ["TrainedStudent", "load_student"]

"""From a checkpoint to a diffusers pipeline folder that samples where unidad_pl is not installed."""

from unidad_pl.export.student import export_student, load_export

__all__ = ["export_student", "load_export"]

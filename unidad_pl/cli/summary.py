"""What a run prints when training ends: numbers before and after, where the files lie, what to run next."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from unidad_pl.modules.unidad import UniDAD

if TYPE_CHECKING:
    import lightning.pytorch as pl


def fit_summary(
    trainer: pl.Trainer, folder: Path, before: dict[str, float] | None, after: dict[str, float] | None
) -> None:
    """Print the closing summary of ``fit`` on this process.

    Args:
        trainer: the trainer that has fitted.
        folder: the run folder.
        before: metric name -> value of the untrained weights; None leaves the column out.
        after: metric name -> value of the trained weights; None leaves the table out.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if after:
        table = Table(title=f"after {trainer.global_step} iterations", title_justify="left")
        table.add_column("metric")
        for heading in ("before", "after") if before else ("after",):
            table.add_column(heading, justify="right")
        for name in after:
            cells = [f"{before[name]:.4g}" if name in before else "-"] if before else []
            table.add_row(name, *cells, f"{after[name]:.4g}")
        console.print(table)
    places = {"run folder": folder, "pictures": folder / "samples", "numbers": folder / "metrics.jsonl"}
    lines = {label: str(path) for label, path in places.items() if label == "run folder" or path.exists()}
    if (checkpoint := _last_checkpoint(trainer)) is not None:
        unidad, lines["checkpoint"] = _command(), checkpoint
        lines["next"] = f"{unidad} predict --config {folder / 'config.yaml'} --ckpt_path {checkpoint}"
        if isinstance(trainer.lightning_module, UniDAD):
            lines["hand on"] = f"{unidad} export --ckpt_path {checkpoint} --out {folder / 'export'}"
    for label, text in lines.items():
        console.print(f"{label:<13} {text}", soft_wrap=True, highlight=False)


def _command() -> str:
    """``unidad`` as the user's shell finds it: with its path if it lies in an environment that is not activated."""
    beside = Path(sys.executable).with_name("unidad")
    return "unidad" if shutil.which("unidad") or not beside.exists() else str(beside)


def _last_checkpoint(trainer: pl.Trainer) -> str | None:
    """The newest checkpoint the run wrote, if it wrote one."""
    callback = trainer.checkpoint_callback
    for name in ("last_model_path", "best_model_path"):
        if path := getattr(callback, name, ""):
            return str(path)
    return None

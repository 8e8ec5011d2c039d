"""What a run prints when training ends: numbers before and after, where the files lie, what to run next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from unidad_pl.callbacks.environment import unidad_command
from unidad_pl.modules.unidad import UniDAD
from unidad_pl.runs.checkpoints import is_remote

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
        own = getattr(getattr(trainer, "datamodule", None), "reference_is_shots", False)
        note = "the reference of the metrics is the shots themselves" if own else None
        table = Table(title=f"after {trainer.global_step} iterations", title_justify="left", caption=note)
        table.add_column("metric")
        for heading in ("before", "after") if before else ("after",):
            table.add_column(heading, justify="right")
        for name in after:
            cells = [f"{before[name]:.4g}" if name in before else "-"] if before else []
            table.add_row(name, *cells, f"{after[name]:.4g}")
        console.print(table)
    for label, text in _places(trainer, folder).items():
        console.print(f"{label:<13} {text}", soft_wrap=True, highlight=False)


def _places(trainer: pl.Trainer, folder: Path) -> dict[str, str]:
    """Label -> path or command, of what is there; commands as a shell takes them, whatever the paths hold."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return {"run folder": "none: a fast_dev_run writes nothing"}
    places = {"run folder": folder, "pictures": folder / "samples", "numbers": folder / "metrics.jsonl"}
    lines = {label: str(path) for label, path in places.items() if label == "run folder" or path.exists()}
    checkpoint, config = _last_checkpoint(trainer), folder / "config.yaml"
    if checkpoint is not None:
        lines["checkpoint"] = checkpoint
        unidad, quoted = unidad_command(), shlex.quote(checkpoint)
        if config.is_file():
            lines["next"] = f"{unidad} predict --config {shlex.quote(str(config))} --ckpt_path {quoted}"
        if isinstance(trainer.lightning_module, UniDAD):
            out = shlex.quote(str(folder / "export"))
            lines["hand on"] = f"{unidad} export --ckpt_path {quoted} --out {out}"
    return lines


def _last_checkpoint(trainer: pl.Trainer) -> str | None:
    """The newest checkpoint the run wrote, if it wrote one."""
    callback = trainer.checkpoint_callback
    for name in ("last_model_path", "best_model_path"):
        if (path := getattr(callback, name, "")) and (is_remote(path) or Path(path).exists()):
            return str(path)
    return None

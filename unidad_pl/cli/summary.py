"""What a fit prints: its networks when it begins; numbers before and after, files and next commands when it ends."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary
from torch import nn

from unidad_pl.backbones.nf4 import weights_in
from unidad_pl.callbacks.base import feature_name
from unidad_pl.callbacks.environment import unidad_command
from unidad_pl.callbacks.fid import FID
from unidad_pl.denoiser import DenoiserSource
from unidad_pl.export.student import can_export
from unidad_pl.metrics.features import InceptionFeatures
from unidad_pl.modules.unidad import UniDAD
from unidad_pl.report.page import FILE, can_write, write_page
from unidad_pl.runs.checkpoints import is_remote
from unidad_pl.training.module import GenerativeModule
from unidad_pl.training.networks import trained

if TYPE_CHECKING:
    from rich.console import Console

ROLES = {
    "source_teacher": "source teacher S", "target_teacher": "target teacher T", "fake_score": "fake score F",
    "discriminator": "heads on F", "student": "student G", "denoiser": "denoiser", "ema": "average",
}  # fmt: skip
"""Attribute of a module -> what a reader of the paper calls the network, in the order of the table."""


class NetworkTable(ModelSummary):
    """Prints the networks of a fit when it begins, a row for each: role, size, whether it learns, and where from.

    >>> NetworkTable()._max_depth
    1
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            _print_networks(trainer, pl_module)


def _print_networks(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    from rich import box
    from rich.table import Table

    found = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    networks = {name: found[name] for name in sorted(found, key=[*ROLES, *found].index)}
    origins = _origins(module)
    weights = {id(p): p for network in networks.values() for p in network.parameters()}.values()  # shared ones once
    size = sum(p.numel() * p.element_size() for p in weights) / 2**20
    caption = f"{_count(trained(module))} of {_count(weights)} parameters trained, weights {size:,.1f} MiB"
    caption += f", precision {trainer.precision}"
    caption += f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
    if trainer.ckpt_path:
        caption += f", trained weights from {trainer.ckpt_path}"
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("network", "parameters", "trained", "dtype", "device", "from"):
        table.add_column(heading, justify="right" if heading == "parameters" else "left", overflow="fold")
    for name, network in networks.items():
        own = list(network.parameters())
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in own}))
        devices = ", ".join(sorted({str(p.device) for p in own}))
        learns = _learns(name, network, module)
        table.add_row(ROLES.get(name, name), _count(own), learns, dtypes, devices, origins.get(name, ""))
    console = _console()
    console.print(table, highlight=False)
    console.print(caption, soft_wrap=True, highlight=False)


def _learns(name: str, network: nn.Module, module: pl.LightningModule) -> str:
    """Whether its weights are trained: all, some (adapters), for how long."""
    learning = trained(network)
    if not learning:
        return "no"
    whole = len(learning) == len(list(network.parameters()))
    answer = "yes" if whole else _count(learning)  # adapters
    until = module.adaptation.until if isinstance(module, UniDAD) and module.adaptation else None
    return f"{answer}, until {until}" if name == "target_teacher" and until else answer


def _origins(module: pl.LightningModule) -> dict[str, str]:
    """Attribute -> where the network's weights are from when training begins."""
    if not isinstance(module, GenerativeModule):
        return {}
    origins = {module.sampled_name: _origin(module.sampled_source)}
    if isinstance(module, UniDAD):
        own = {"student": module.student_options, "fake_score": module.fake_options,
               "target_teacher": module.target_options, "source_teacher": None}  # fmt: skip
        origins = {name: _origin(getattr(options, "init_from", None) or module.source) for name, options in own.items()}
        origins["discriminator"] = "random weights"
        if module.pretrain:
            origins |= dict.fromkeys(("student", "fake_score"), f"T at {module.pretrain}")
    return origins | {"ema": ROLES[module.sampled_name]}


def _origin(source: DenoiserSource) -> str:
    """The paths that a source is given, or what it is."""
    given: dict[str, Any] = getattr(source, "_given", {})
    places = [str(given[name]) for name in ("path", "checkpoint", "unet_weights") if given.get(name)]
    return " with ".join(places) or type(source).__name__


def _count(weights: Iterable[nn.Parameter]) -> str:
    """How many numbers ``weights`` have, in three digits."""
    number = sum(weights_in(p) for p in weights)
    power = min(3, max(0, (len(str(number)) - 1) // 3))
    return f"{number / 1000**power:.{2 if power else 0}f}{('', ' K', ' M', ' B')[power]}"


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
    from rich.table import Table

    console = _console()
    if after:
        title = f"after {trainer.global_step} iterations"
        table = Table(title=title, title_justify="left", caption="\n".join(_notes(trainer)), caption_justify="left")
        table.add_column("metric")
        for heading in ("before", "after") if before else ("after",):
            table.add_column(heading, justify="right")
        for name in after:
            cells = [f"{before[name]:.4g}" if name in before else "-"] if before else []
            table.add_row(name, *cells, f"{after[name]:.4g}")
        console.print(table)
    _print_lines(_places(trainer, folder))
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        _print_lines({"report": _report(folder)})


def _notes(trainer: Any) -> list[str]:
    """What the names in the table do not say."""
    own = getattr(getattr(trainer, "datamodule", None), "reference_is_shots", False)
    notes = ["the reference of the metrics is the shots themselves"] if own else []
    for one in trainer.callbacks:
        if isinstance(one, FID) and not isinstance(one.features, InceptionFeatures):
            features = feature_name(one.features)
            notes.append(f"{one.name}: the Frechet distance in features of {features}, no FID of Inception's")
    return notes


def print_files(trainer: pl.Trainer, folder: Path) -> None:
    """Print on this process where an evaluation has written: its run ``folder``, and what is in it."""
    _print_lines(_files(trainer, folder))


def _console() -> Console:
    """A terminal that prints paths and names as they are, brackets and colons too."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def _print_lines(lines: dict[str, str]) -> None:
    console = _console()
    for label, text in lines.items():
        console.print(f"{label:<13} {text}", soft_wrap=True, highlight=False)


def _report(folder: Path) -> str:
    """The page about the run, which is written now: that takes two or three seconds. Or the command that writes it."""
    command = f"{unidad_command()} report {shlex.quote(str(folder))}"
    if not can_write():
        return f"{shlex.quote(sys.executable)} -m pip install 'unidad_pl[report]' && {command}"
    try:
        return shlex.quote(str(write_page([folder], folder / FILE)))
    except Exception as error:  # noqa: BLE001 (the training is done and well, whatever a page of it lacks)
        return f"could not be written ({error}); to try again: {command} --debug"


def _files(trainer: pl.Trainer, folder: Path) -> dict[str, str]:
    """Label -> path, of what is there."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return {"run folder": "none: a fast_dev_run writes nothing"}
    places = {"run folder": folder, "pictures": folder / "samples", "numbers": folder / "metrics.jsonl"}
    return {label: shlex.quote(str(path)) for label, path in places.items() if label == "run folder" or path.exists()}


def _places(trainer: pl.Trainer, folder: Path) -> dict[str, str]:
    """Label -> path or command, of what is there; commands as a shell takes them, whatever the paths hold."""
    lines = _files(trainer, folder)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return lines
    checkpoint, config = _last_checkpoint(trainer), folder / "config.yaml"
    if checkpoint is not None:
        unidad, quoted = unidad_command(), shlex.quote(checkpoint)
        lines["checkpoint"] = quoted
        if config.is_file():
            options = f"--config {shlex.quote(str(config))} --ckpt_path {quoted}"
            lines |= {"next": f"{unidad} predict {options}", "measure": f"{unidad} test {options}"}
        if isinstance(trainer.lightning_module, UniDAD):
            out = shlex.quote(str(folder / "export"))
            lines |= {"look": f"{unidad} demo --model {quoted}"} if Path(checkpoint).is_file() else {}
            if can_export(trainer.lightning_module.student):
                lines["hand on"] = f"{unidad} export --ckpt_path {quoted} --out {out}"
    return lines


def _last_checkpoint(trainer: pl.Trainer) -> str | None:
    """The newest checkpoint the run wrote, if it wrote one."""
    callback = trainer.checkpoint_callback
    for name in ("last_model_path", "best_model_path"):
        if (path := getattr(callback, name, "")) and (is_remote(path) or Path(path).exists()):
            return str(path)
    return None

"""The same seeds drawn by the few-step student and by its many-step teachers, to see which of them is at fault."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from unidad_pl.callbacks.base import EvaluationCallback
from unidad_pl.callbacks.outputs import Samples
from unidad_pl.callbacks.records import on_rank_zero, run_folder, trained_iterations
from unidad_pl.callbacks.sample_grid import FirstImages
from unidad_pl.checks import check_whole
from unidad_pl.data.pictures import as_uint8, grid, write_png

FOLDER, STUDENT = "samples/networks", "student"
NEEDED = ("sample_network", "denoisers", "frozen_networks")
TEACHERS = ("target_teacher", "source_teacher")


class TeacherGrid(EvaluationCallback):
    """Writes ``<run folder>/samples/networks/<stage>_step<step>/<network>.png``, one picture for each network.

        >>> trainer = pl.Trainer(callbacks=[TeacherGrid(count=8, num_steps=8)])  # unidad report shows them side by side

    All show the same seeds, each network beginning with the same noise. The student's are among the samples of the
    evaluation anyway; the module's ``sample_network(name, seeds, num_steps)`` draws the others. A frozen network is
    drawn once.

    Args:
        count: samples in a picture: those with the lowest seeds.
        num_steps: sampling steps of the teachers. Few show what they know in little time, not how well they can draw.
        networks: what is drawn beside the student; null: the teachers that the module has.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: a number below 1, or no networks. In Lightning's sanity steps: a module without such a network, or
            one that draws prompts.
        TypeError: in ``setup``: a module that cannot be asked.
    """

    def __init__(
        self, count: int = 8, num_steps: int = 8, networks: Sequence[str] | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        check_whole(1, count=count, num_steps=num_steps)
        if networks is not None and (isinstance(networks, str) or not networks):
            raise ValueError(f"networks must be a list of names, or null for the teachers, got {networks!r}")
        self.count, self.num_steps, self.networks = count, num_steps, networks
        self.metric: FirstImages = FirstImages(count)
        self._drawn: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def produces(self) -> list[str]:
        return ["networks"]

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module: Any = pl_module
        missing = [name for name in NEEDED if not hasattr(module, name)]
        if missing:
            raise TypeError(
                f"TeacherGrid needs a module with {', '.join(missing)}, as unidad_pl.UniDAD has; "
                f"{type(module).__name__} has none: remove the callback"
            )
        self._drawn = {}

    def inspect(self, trainer: pl.Trainer, samples: Samples) -> None:
        if samples.prompts is not None:
            raise ValueError(
                "TeacherGrid draws from seeds alone, and these samples were asked for by prompts: leave it out, "
                "PromptGrid shows the pictures of every prompt"
            )
        module: Any = trainer.lightning_module
        there = module.denoisers()
        if unknown := [name for name in self._names(module) if name not in there]:
            raise ValueError(f"TeacherGrid: there is no network {unknown[0]!r}, this module has {', '.join(there)}")

    def _names(self, module: Any) -> Sequence[str]:
        there = module.denoisers()
        return [name for name in TEACHERS if name in there] if self.networks is None else self.networks

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self.metric.update(as_uint8(images), seeds, seeds)  # in the place of classes, to know everyone's

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        module: Any = pl_module
        samples, seeds = self.metric.compute()
        seeds = seeds.reshape(-1)  # torchmetrics makes a scalar of a single number
        pictures = {STUDENT: samples.cpu()}
        for name in self._names(module):  # on every rank: a sharded network needs them all
            key = (name, tuple(seeds.tolist()))
            drawn = self._drawn.get(key)
            pictures[name] = as_uint8(module.sample_network(name, seeds, self.num_steps)) if drawn is None else drawn
            if name in module.frozen_networks:
                self._drawn[key] = pictures[name]
        folder = run_folder(trainer) / FOLDER / f"{self.named([stage])[0]}_step{trained_iterations(trainer):08d}"
        on_rank_zero(trainer, folder, lambda: write_all(pictures, folder))


def write_all(pictures: dict[str, Tensor], folder: Path) -> None:
    """Images [N, C, H, W] uint8 of each network as one PNG, about two rows of them."""
    for name, images in pictures.items():
        columns = max(1, -(-len(images) // 2))
        write_png(grid(images.expand(-1, 3, -1, -1), None, columns, 1), folder / f"{name}.png")

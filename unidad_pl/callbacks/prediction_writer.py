"""Write what ``trainer.predict`` generates, one PNG per seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from unidad_pl.callbacks.outputs import OutputCallback, Samples
from unidad_pl.callbacks.records import run_folder
from unidad_pl.data.pictures import as_uint8, write_png
from unidad_pl.files import expanded, sharing
from unidad_pl.metrics.gather import NumberedRows


class PredictionWriter(OutputCallback):
    """Writes ``<folder>/<seed>.png`` for every image that ``predict_step`` returns; an older file is overwritten.

        >>> trainer = pl.Trainer(callbacks=[PredictionWriter("pictures")])  # predict writes pictures/000000.png, ...

    Every rank writes its own images. Values are rounded to 8 bits. With ``fast_dev_run`` nothing is written.

    Args:
        folder: where to write. Default: ``<run folder>/predictions``.
        key: entry of the outputs that holds the images [B, 3, H, W] in [-1, 1]; ``seeds`` are their numbers.

    Raises:
        RuntimeError: a file cannot be written.
        ValueError: in ``setup``, another one writes to the same folder.
    """

    def __init__(self, folder: str | None = None, key: str = "samples") -> None:
        super().__init__(key, stages=["predict"])
        self.folder = folder
        self._target = Path()
        self._written = NumberedRows(torch.long)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "predict" and any(
            isinstance(other, PredictionWriter) and other is not self and other.folder == self.folder
            for other in callbacks
        ):
            raise ValueError(
                f"two PredictionWriters write to folder={self.folder!r} and would overwrite each other's files: give "
                f"one of them another folder="
            )

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own = run_folder(trainer) / "predictions"
        self._target = own if self.folder is None else expanded(self.folder)
        self._written = NumberedRows(torch.long).to(pl_module.device)

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, samples: Samples) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._written.update(samples.seeds[:, None].to(pl_module.device), samples.seeds.to(pl_module.device))
        paths = [self._target / f"{seed:06d}.png" for seed in samples.seeds.tolist()]
        path = paths[0]
        try:
            with sharing(self._target):
                for image, path in zip(as_uint8(samples.images), paths, strict=True):
                    write_png(image, path)
        except OSError as error:
            raise RuntimeError(
                f"cannot write {path} ({type(error).__name__}: {error}): free disk space, or choose another folder="
            ) from error

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        own = torch.tensor([self._seen], device=pl_module.device)
        seen, written = int(trainer.strategy.all_gather(own).sum()), self._written.compute().numel()
        if seen - written >= trainer.world_size:  # samplers fill up the shares of ranks with seeds of others
            rank_zero_warn(
                f"PredictionWriter: {seen - written} of {seen} images had a seed that came before and overwrote that "
                f"file: return unique 'seeds' from predict_step"
            )
        rank_zero_info(f"PredictionWriter: {written} images are in {self._target}")

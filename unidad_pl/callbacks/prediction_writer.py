"""Write what ``trainer.predict`` generates, one PNG per seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from unidad_pl.callbacks.base import read_outputs
from unidad_pl.data.pictures import as_uint8, write_png
from unidad_pl.callbacks.records import run_folder


class PredictionWriter(pl.Callback):
    """Writes ``<folder>/<seed>.png`` for every image that ``predict_step`` returns; an older file is overwritten.

    Every rank writes its own images. Values are rounded to 8 bits. The images are what ``predict_step`` returned in a
    dict, under ``key``, with their ``seeds``.

    Args:
        folder: where to write. Default: ``<run folder>/predictions``.
        key: entry of the outputs that holds the images [B, 3, H, W] in [-1, 1].

    Raises:
        RuntimeError: a file cannot be written.
    """

    def __init__(self, folder: str | None = None, key: str = "samples") -> None:
        self.folder, self.key = folder, key
        self._target = Path()
        self._seen = 0
        self._written: set[int] = set()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own = run_folder(trainer) / "predictions"
        self._target = own if self.folder is None else Path(self.folder).expanduser()
        self._seen, self._written = 0, set()

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        images, seeds = read_outputs(outputs, self.key, "PredictionWriter: predict_step", self._seen)
        self._seen += len(images)
        for image, seed in zip(as_uint8(images), seeds.tolist(), strict=True):
            path = self._target / f"{seed:06d}.png"
            try:
                write_png(image, path)
            except OSError as error:
                raise RuntimeError(
                    f"cannot write {path} ({type(error).__name__}: {error}): free disk space, or choose another folder="
                ) from error
            self._written.add(seed)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counts = torch.tensor([self._seen, len(self._written)], device=pl_module.device)
        seen, written = trainer.strategy.all_gather(counts).reshape(-1, 2).sum(0).tolist()
        if seen > written:
            rank_zero_warn(
                f"PredictionWriter: {seen - written} of {seen} images had a seed that came before and overwrote that "
                f"file: return unique 'seeds' from predict_step"
            )
        rank_zero_info(f"PredictionWriter: {written} images are in {self._target}")

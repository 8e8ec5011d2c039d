"""A picture of the same samples at every evaluation, under the shots they were learnt from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from unidad_pl.callbacks.base import STAGES, EvaluationCallback, Report
from unidad_pl.data.pictures import as_uint8, grid, write_png
from unidad_pl.callbacks.records import on_rank_zero, run_folder, trained_steps
from unidad_pl.callbacks.sources import Images, ImageSource, model_range
from unidad_pl.metrics.gather import RowMetric, distinct_in_order

VISIBLE = 64  # pixels an image should be wide at least
NO_CLASS = -1


class FirstImages(RowMetric):
    """The ``most`` images with the lowest numbers over all ranks, and their classes; a rank keeps no more than that."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.add_rows("index", 1, torch.long)
        self.add_rows("images", 4, torch.uint8)
        self.add_rows("labels", 1, torch.long)

    def update(self, images: Tensor, index: Tensor, labels: Tensor | None) -> None:
        """``images`` [B, 3, H, W] uint8 numbered ``index`` [B], of the classes ``labels`` [B] or of none."""
        self.append("images", images)
        self.append("index", index)
        self.append("labels", torch.full_like(index, NO_CLASS) if labels is None else labels.to(index))
        first = distinct_in_order(self.rows("index"))[: self.most]
        for name in ("images", "index", "labels"):
            setattr(self, name, [self.rows(name)[first]])

    def compute(self) -> tuple[Tensor, Tensor]:
        """Images [n, 3, H, W] uint8 and labels [n], n <= most, in the order of the numbers."""
        first = distinct_in_order(self.rows("index"))[: self.most]
        return self.rows("images")[first], self.rows("labels")[first]


def row_per_class(images: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Images [n, 3, H, W] sorted by ``labels`` [n], every class filled up to a row with black, and the row's length."""
    classes, counts = labels.unique(return_counts=True)
    columns = int(counts.max())
    rows = images.new_zeros(len(classes), columns, *images.shape[1:])
    for row, label in zip(rows, classes, strict=True):
        same = images[labels == label]
        row[: len(same)] = same
    return rows.flatten(0, 1), columns


class SampleGrid(EvaluationCallback):
    """Writes ``<run folder>/samples/<stage>_step<step>.png`` and hands the picture to the loggers that take images.

    Args:
        count: samples in the picture: those with the lowest seeds, so the same ones every time.
        columns: images per row; default about the square root of ``count``, and a row per class for steps that return
            ``labels``.
        shots_on_top: begin with the shots, above a thin line.
        every_n_evaluations: write at the first evaluation and then at every n-th.
        scale: enlargement by whole pixels; default what makes an image 64 pixels wide or more.
        shots: folder or tensor [k, 3, H, W] (uint8, or float in [-1, 1]). Default: ``trainer.datamodule.shots``.
        key: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.
        dataloader_idx: see there.
        stages: see there.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self,
        count: int = 64,
        columns: int | None = None,
        shots_on_top: bool = True,
        every_n_evaluations: int = 1,
        scale: int | None = None,
        shots: Images = None,
        key: str = "samples",
        dataloader_idx: int = 0,
        stages: Sequence[str] = STAGES,
    ) -> None:
        super().__init__(key, dataloader_idx, stages)
        for name, value in (
            ("count", count),
            ("columns", columns),
            ("every_n_evaluations", every_n_evaluations),
            ("scale", scale),
        ):
            if value is not None and value < 1:
                raise ValueError(f"SampleGrid: {name} must be at least 1, got {value}")
        self.count, self.every_n_evaluations, self.scale = count, every_n_evaluations, scale
        self.columns = columns
        self.shots_on_top = shots_on_top
        self.shots = ImageSource("SampleGrid(shots_on_top=True)", "shots", shots)
        self._evaluations: dict[str, int] = {}
        self._metric = FirstImages(count)

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.shots_on_top:
            self.shots.check(trainer)

    def begin(self, pl_module: pl.LightningModule) -> None:
        self._metric.to(pl_module.device).reset()

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self._metric.update(as_uint8(images), seeds, self._labels)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report | None:
        done = self._evaluations[stage] = self._evaluations.get(stage, 0) + 1
        if (done - 1) % self.every_n_evaluations:
            return None
        samples, labels = self._metric.compute()
        columns = self.columns or math.ceil(math.sqrt(self.count))
        if self.columns is None and bool((labels != NO_CLASS).all()):
            samples, columns = row_per_class(samples, labels)
        size = (samples.shape[2], samples.shape[3])
        shots = model_range(self.shots.load(trainer, size)) if self.shots_on_top else None
        scale = -(-VISIBLE // samples.shape[3]) if self.scale is None else self.scale
        picture = grid(samples, shots, columns, scale)
        path = run_folder(trainer) / "samples" / f"{stage}_step{trained_steps(trainer):08d}.png"
        on_rank_zero(trainer, str(path), lambda: write_png(picture, path))
        if trainer.is_global_zero:
            log_picture(trainer, f"{stage}/samples", picture)
        return None


def log_picture(trainer: pl.Trainer, tag: str, picture: Tensor) -> None:
    """Give a picture [3, H, W] uint8 to every logger that can show one (TensorBoard, W&B, ...)."""
    loggers: list[Any] = list(trainer.loggers)
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[picture.permute(1, 2, 0).numpy()], step=trainer.global_step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            logger.experiment.add_image(tag, picture, trainer.global_step)

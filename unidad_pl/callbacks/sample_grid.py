"""A picture of the same samples at every evaluation, below the shots they were learnt from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from unidad_pl.callbacks.base import EvaluationCallback
from unidad_pl.callbacks.given_images import GivenImages, Images, model_range
from unidad_pl.callbacks.outputs import Samples
from unidad_pl.callbacks.records import on_rank_zero, run_folder, trained_iterations
from unidad_pl.checks import check_whole
from unidad_pl.data.pictures import as_uint8, grid, write_png
from unidad_pl.metrics.gather import RowMetric, distinct_in_order

VISIBLE = 64  # an image should be at least this many pixels wide
NO_CLASS = -1
ENTRY = "unidad_pl/evaluations"
"""Of a checkpoint: name of the callback -> stage -> how many evaluations it has seen."""


class FirstImages(RowMetric):
    """The ``wanted`` images with the lowest numbers over all ranks, and their classes; a rank keeps no more."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted = wanted
        self.add_rows("index", 1, torch.long, numbers="index")
        self.add_rows("images", 4, torch.uint8)
        self.add_rows("labels", 1, torch.long)

    def update(self, images: Tensor, index: Tensor, labels: Tensor | None) -> None:
        """``images`` [B, 3, H, W] uint8 numbered ``index`` [B], of the classes ``labels`` [B] or of none."""
        self.append("images", images)
        self.append("index", index)
        self.append("labels", torch.full_like(index, NO_CLASS) if labels is None else labels.to(index))
        first = distinct_in_order(self.rows("index"))[: self.wanted]
        for name in ("images", "index", "labels"):
            setattr(self, name, [self.rows(name)[first]])

    def compute(self) -> tuple[Tensor, Tensor]:
        """Images [n, 3, H, W] uint8 and labels [n], n <= wanted, in the order of their numbers."""
        first = distinct_in_order(self.rows("index"))[: self.wanted]
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

        >>> trainer = pl.Trainer(callbacks=[SampleGrid(count=16, columns=8, stages=["val"])])

    Args:
        count: samples in the picture: those with the lowest seeds, so the same ones every time.
        columns: images per row; default about the square root of ``count``, and a row per class where the module
            returns ``labels``.
        shots_on_top: begin with the shots, above a thin line.
        every_n_evaluations: write at the first evaluation and then at every n-th.
        scale: enlargement by whole pixels; default what makes an image 64 pixels wide or more.
        shots: folder or tensor [k, 3, H, W] (uint8, or float in [-1, 1]), or a list of images. Default:
            ``trainer.datamodule.shots``.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

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
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_whole(1, count=count, every_n_evaluations=every_n_evaluations)
        check_given(columns=columns, scale=scale)
        self.count, self.columns, self.scale = count, columns, scale
        self.shots_on_top, self.every_n_evaluations = shots_on_top, every_n_evaluations
        self.shots = GivenImages("SampleGrid(shots_on_top=True)", "shots", shots)
        self.metric: FirstImages = FirstImages(count)
        self._evaluations: dict[str, int] = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # No state_dict: of callbacks that have one, Lightning allows a single one of a kind.
        checkpoint.setdefault(ENTRY, {}).setdefault(str(self.name), {}).update(self._evaluations)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._evaluations |= checkpoint.get(ENTRY, {}).get(str(self.name), {})

    def produces(self) -> list[str]:
        return ["samples"]

    def inspect(self, trainer: pl.Trainer, samples: Samples) -> None:
        if self.shots_on_top:
            self.shots.check_size(trainer, (samples.images.shape[2], samples.images.shape[3]))

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.shots_on_top:
            self.shots.check(trainer)

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self.metric.update(as_uint8(images), seeds, self._labels)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        done = self._evaluations[stage] = self._evaluations.get(stage, 0) + 1
        if (done - 1) % self.every_n_evaluations:
            return
        samples, labels = self.metric.compute()
        columns = self.columns or math.ceil(math.sqrt(self.count))
        if self.columns is None and bool((labels != NO_CLASS).all()):
            samples, columns = row_per_class(samples, labels)
        size = (samples.shape[2], samples.shape[3])
        shots = model_range(self.shots.load(trainer, size)) if self.shots_on_top else None
        picture = grid(samples, shots, columns, self.scale or default_scale(samples))
        path = run_folder(trainer) / "samples" / f"{self.named([stage])[0]}_step{trained_iterations(trainer):08d}.png"
        publish(trainer, picture, path, f"{stage}/{self.named(['samples'])[0]}")


def check_given(**values: int | None) -> None:
    """Refuse numbers of pixels or pictures below 1; None is left alone.

    Raises:
        ValueError: names the first of them.
    """
    check_whole(1, 2**31 - 1, null=True, **values)


def default_scale(images: Tensor) -> int:
    """The enlargement that makes images [N, 3, H, W] wide enough to be seen."""
    return -(-VISIBLE // images.shape[3])


def publish(trainer: pl.Trainer, picture: Tensor, path: Path, tag: str) -> None:
    """Write a picture [3, H, W] uint8 to ``path``, and give it to the loggers under ``tag``, both on rank 0.

    Raises:
        RuntimeError: on every rank, if it cannot be written.
    """
    on_rank_zero(trainer, path, lambda: write_png(picture, path))
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        log_picture(trainer, tag, picture)


def log_picture(trainer: pl.Trainer, tag: str, picture: Tensor) -> None:
    """Give a picture [3, H, W] uint8 to every logger that can show one (TensorBoard, W&B, MLflow, ...)."""
    loggers: list[Any] = list(trainer.loggers)
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[picture.permute(1, 2, 0).numpy()], step=trainer.global_step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            logger.experiment.add_image(tag, picture, trainer.global_step)
        elif hasattr(logger, "run_id") and hasattr(logger.experiment, "log_image"):  # MLflow
            pixels = picture.permute(1, 2, 0).numpy()
            logger.experiment.log_image(logger.run_id, pixels, key=tag, step=trainer.global_step, synchronous=True)

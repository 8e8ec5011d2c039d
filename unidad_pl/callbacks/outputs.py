"""What a val, test or predict step returns, read in one way by every callback that looks at generated images.

A callback sees a LightningModule through nothing else: a dict with ``samples`` [B, 3, H, W] in [-1, 1], and optionally
``seeds`` (B integers, the samples' global numbers), ``prompts`` (B strings), ``labels`` (B class numbers) and
``weights`` (``"ema"`` or ``"raw"``). So it works in any Lightning project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from unidad_pl.callbacks.given_images import check_range
from unidad_pl.metrics.gather import sample_indices

METHODS = {"val": "validation_step", "test": "test_step", "predict": "predict_step"}


@dataclass
class Samples:
    """What a step returned.

    Attributes:
        images: [B, 3, H, W] float32 in [-1, 1].
        seeds: [B] int64, the samples' global numbers.
        labels: [B] class numbers, or None.
        prompts: B strings, or None.
        weights: which weights made the images, or None.
    """

    images: Tensor
    seeds: Tensor
    labels: Tensor | None
    prompts: list[str] | None
    weights: str | None


class OutputCallback(pl.Callback):
    """Base: follows some of Lightning's evaluation loops and reads the images that the module returns in them.

    A subclass implements ``_begin``, ``_collect`` and ``_end``. Sanity checks are passed over.

    Args:
        key: entry of the step's outputs that holds the images.
        stages: the loops to follow: some of ``val``, ``test`` and ``predict``.
        dataloader_idx: with several dataloaders, the one whose samples are read; None: all of them.
    """

    def __init__(self, key: str, stages: Sequence[str], dataloader_idx: int | None = None) -> None:
        self.key, self.stages, self.dataloader_idx = key, tuple(stages), dataloader_idx
        self._seen = 0  # samples of this rank in this loop

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        raise NotImplementedError

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, samples: Samples) -> None:
        raise NotImplementedError

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        raise NotImplementedError

    def _stage(self, trainer: pl.Trainer) -> str:
        """The loop that runs, if it is one to follow, or an empty string."""
        running = trainer.state.stage
        stage = None if running is None or trainer.sanity_checking else running.dataloader_prefix
        return stage if stage in self.stages else ""

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._stage(trainer):
            self._seen = 0
            self._begin(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        stage = self._stage(trainer)
        if stage and self.dataloader_idx in (None, dataloader_idx):
            samples = read_outputs(outputs, self.key, f"{type(self).__name__}: {METHODS[stage]}", self._seen)
            self._seen += len(samples.images)
            self._collect(trainer, pl_module, samples)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if stage := self._stage(trainer):
            self._end(trainer, pl_module, stage)

    # The same for every loop: the trainer knows which one runs.
    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end


def read_outputs(outputs: Any, key: str, where: str, seen: int) -> Samples:
    """The samples in what a step returned; labels or prompts that are not one per image are left out.

    Args:
        outputs: the step's return value.
        key: entry with the images; one channel is repeated to three.
        where: how error messages begin.
        seen: samples this rank returned before; numbers follow from it if there is no entry ``seeds``.

    Raises:
        TypeError: not a dict.
        KeyError: no such entry; names the entries there are.
        ValueError: not images, values outside [-1, 1], or another number of seeds.
    """
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"{where} must return a dict with the generated images under {key!r}, got {type(outputs).__name__}"
        )
    if key not in outputs:
        raise KeyError(f"{where} returned no {key!r}, only {', '.join(map(repr, outputs))}: return it, or set key=")
    images = outputs[key]
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{where}: {key!r} must be a tensor [B, 3, H, W], got {got}")
    if not images.is_floating_point():
        raise ValueError(f"{where}: {key!r} must be floats in [-1, 1], got {images.dtype}")
    check_range(images, f"{where}: {key!r}")
    images, count = images.detach().float().expand(-1, 3, -1, -1), len(images)
    seeds = sample_indices(count, outputs.get("seeds"), seen).to(images.device)
    labels, prompts = outputs.get("labels"), outputs.get("prompts", ())
    if not isinstance(labels, Tensor) or labels.shape != (count,) or labels.is_floating_point():
        labels = None
    texts = isinstance(prompts, (list, tuple)) and all(isinstance(prompt, str) for prompt in prompts)
    prompts = list(prompts) if texts and len(prompts) == count else None
    return Samples(images, seeds, labels, prompts, str(outputs["weights"]) if "weights" in outputs else None)

"""What a val, test or predict step returns, read in one way by every callback that looks at generated images.

A callback sees a LightningModule through nothing else: a dict with ``samples`` [B, 3, H, W] in [-1, 1] (or uint8, or of
one channel, or a list: see :func:`~unidad_pl.callbacks.given_images.as_images`), and optionally
``seeds`` (B integers, the samples' global numbers), ``prompts`` (B strings), ``labels`` (B class numbers) and
``weights`` (a word, ``"ema"`` or ``"raw"``). So it works in any Lightning project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from unidad_pl.arguments import given_arguments
from unidad_pl.callbacks.given_images import as_images, model_range
from unidad_pl.checks import check_whole
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
        numbered: whether the step gave the seeds.
    """

    images: Tensor
    seeds: Tensor
    labels: Tensor | None
    prompts: list[str] | None
    weights: str | None
    numbered: bool = True


class OutputCallback(pl.Callback):
    """Base: follows some of Lightning's evaluation loops and reads the images that the module returns in them.

    A subclass implements ``_begin``, ``_collect`` and ``_end``. In Lightning's sanity steps outputs are read and
    checked, so that a step that returns the wrong thing fails before the training, and nothing is collected.

    Args:
        key: entry of the step's outputs that holds the images.
        stages: the loops to follow: some of ``val``, ``test`` and ``predict``.
        dataloader_idx: with several dataloaders, the one whose samples are read; None: all of them.

    Raises:
        ValueError: ``key`` is no name, or ``dataloader_idx`` no whole number of at least 0.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> OutputCallback:
        given_arguments(cls.__init__, args, kwargs)  # refuses what is of another kind than they say
        return super().__new__(cls)

    def __init__(self, key: str, stages: Sequence[str], dataloader_idx: int | None = None) -> None:
        if not key or not isinstance(key, str):
            raise ValueError(f"key must be the name of an entry of the step's outputs, got {key!r}")
        if dataloader_idx is not None:
            check_whole(0, dataloader_idx=dataloader_idx)
        self.key, self.stages, self.dataloader_idx = key, tuple(stages), dataloader_idx
        self._seen = 0  # samples of this rank in this loop

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        raise NotImplementedError

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, samples: Samples) -> None:
        raise NotImplementedError

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        raise NotImplementedError

    def _inspect(self, trainer: pl.Trainer, samples: Samples) -> None:
        """Refuse what a sanity step returned, if it lacks something; it has been read already."""

    def _sanity(self, trainer: pl.Trainer) -> bool:
        return trainer.sanity_checking and "val" in self.stages

    def _stage(self, trainer: pl.Trainer) -> str:
        """The loop that runs, if it is one to follow, or an empty string."""
        running = trainer.state.stage
        stage = None if running is None or trainer.sanity_checking else running.dataloader_prefix
        return stage if stage in self.stages else ""

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loaders = len(trainer.num_sanity_val_batches) if self._sanity(trainer) else None
        if loaders is not None and (self.dataloader_idx or 0) >= loaders:
            raise ValueError(
                f"{type(self).__name__}: no batch will come from dataloader_idx={self.dataloader_idx}: there are "
                f"{loaders} val dataloaders"
            )
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
        stage = "val" if self._sanity(trainer) else self._stage(trainer)
        if not stage or self.dataloader_idx not in (None, dataloader_idx):
            return
        samples = read_outputs(outputs, self.key, f"{type(self).__name__}: {METHODS[stage]}", self._seen)
        if trainer.sanity_checking:
            self._inspect(trainer, samples)
        else:
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
    """The samples in what a step returned; labels or prompts that are not one per image are left out, with a warning.

    Args:
        outputs: the step's return value.
        key: entry with the images; see :func:`~unidad_pl.callbacks.given_images.as_images`.
        where: how error messages begin.
        seen: samples this rank returned before; numbers follow from it if there is no entry ``seeds``.

    Raises:
        TypeError: not a dict.
        KeyError: no such entry; names the entries there are.
        ValueError: not images, NaN, values outside [-1, 1], or another number of seeds.
    """
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"{where} must return a dict with the generated images under {key!r}, got {type(outputs).__name__}"
        )
    if key not in outputs:
        raise KeyError(f"{where} returned no {key!r}, only {', '.join(map(repr, outputs))}: return it, or set key=")
    images = model_range(as_images(outputs[key], f"{where}: {key!r}"))
    count = len(images)
    seeds = sample_indices(count, outputs.get("seeds"), seen).to(images.device)
    labels, prompts, weights = (outputs.get(name) for name in ("labels", "prompts", "weights"))
    if labels is not None and (labels := class_numbers(labels, count)) is None:
        rank_zero_warn(f"{where}: 'labels' are left out, they are not {count} whole numbers, one for each image")
    texts = isinstance(prompts, (list, tuple)) and all(isinstance(prompt, str) for prompt in prompts)
    if prompts is not None and not (texts and len(prompts) == count):
        rank_zero_warn(f"{where}: 'prompts' are left out, they are not a list of {count} strings, one for each image")
        prompts = None
    texts_of_all = None if prompts is None else list(prompts)
    weights = weights if isinstance(weights, str) else None
    return Samples(images, seeds, labels, texts_of_all, weights, numbered=outputs.get("seeds") is not None)


def class_numbers(labels: Any, count: int) -> Tensor | None:
    """Class numbers [count] from a tensor [count] or [count, 1] or a list of them; None of anything else.

    >>> class_numbers([2, 0], 2), class_numbers(torch.eye(2), 2)
    (tensor([2, 0]), None)
    """
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    return numbers.reshape(count) if whole and tuple(numbers.shape) in ((count,), (count, 1)) else None

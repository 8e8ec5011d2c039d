"""What of a trainer and of Lightning's callbacks cannot work, would do nothing, or never end, with our modules.

Optimisation is manual here, and the training data one epoch without an end. Lightning says so of some options
(``gradient_clip_val``, ``accumulate_grad_batches``) and leaves the others aside without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, Timer
from lightning.pytorch.strategies import SingleDeviceStrategy

from unidad_pl.strategies import ManualDDPStrategy, ShardedStrategy

STRATEGIES = (SingleDeviceStrategy, ManualDDPStrategy, ShardedStrategy)
AVERAGES = {"StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging"}


def refuse_trainer(trainer: pl.Trainer) -> None:
    """Refuse what is known before the data is: called at the start of a fit.

    Raises:
        RuntimeError: names the first option, says why, and what to use.
    """
    _refuse(_unfit(trainer))
    _refuse(_idle(trainer))


def refuse_endless(trainer: pl.Trainer) -> None:
    """Refuse what an epoch without an end leaves waiting for its end: called when the loaders are there.

    Raises:
        RuntimeError: names the first option, says why, and what to use.
    """
    if trainer.num_training_batches == math.inf:
        _refuse(_never_due(trainer))


def _refuse(found: Iterator[str]) -> None:
    for problem in found:
        raise RuntimeError(problem)


def _unfit(trainer: Any) -> Iterator[str]:
    if not isinstance(trainer.strategy, STRATEGIES):  # DistributedDataParallel wants every parameter in every backward
        yield (
            f"strategy {type(trainer.strategy).__name__} cannot step several optimisers that each own their gradients. "
            f"Give the trainer the strategy unidad_ddp: processes as in ddp, gradients averaged once per optimiser "
            f"step; or unidad_fsdp, which also shards the networks over the ranks."
        )


def _idle(trainer: Any) -> Iterator[str]:
    if trainer.gradient_clip_val is not None or trainer.gradient_clip_algorithm is not None:
        yield (
            "trainer.gradient_clip_val and gradient_clip_algorithm do nothing here: set clip in the optimizer of each "
            "group, e.g. --model.student.optimizer.clip"
        )
    if trainer.accumulate_grad_batches != 1:
        yield "trainer.accumulate_grad_batches does nothing here: use --model.training.accumulate"
    if trainer.overfit_batches:
        yield (
            "trainer.overfit_batches does nothing here: every batch is drawn from the shots by its position. Use fewer "
            "--data.shots"
        )
    for callback in trainer.callbacks:
        name = type(callback).__name__
        if isinstance(callback, ModelCheckpoint):
            yield from _idle_checkpoint(callback, trainer)
        elif isinstance(callback, EarlyStopping) and not trainer.limit_val_batches:
            if not callback._check_on_train_epoch_end:
                yield f"{name} never looks at {callback.monitor!r}: limit_val_batches is 0, so nothing is validated"
        elif isinstance(callback, StochasticWeightAveraging) or name in AVERAGES:
            yield f"{name} would average the frozen networks and the critic too: use --model.training.ema_decay"


def _idle_checkpoint(callback: ModelCheckpoint, trainer: Any) -> Iterator[str]:
    if callback._train_time_interval is not None:
        yield (
            "ModelCheckpoint's train_time_interval never saves here (Lightning ignores it under manual optimisation): "
            "use every_n_train_steps"
        )
    if callback.monitor is not None and callback.monitor.startswith("val"):
        if not trainer.limit_val_batches:
            yield f"ModelCheckpoint never saves: monitor {callback.monitor!r} comes from the validation, which is off"
        if callback._every_n_train_steps and callback.save_top_k != 0:
            yield (
                f"ModelCheckpoint with monitor {callback.monitor!r} and every_n_train_steps ranks a checkpoint by the "
                f"validation before it: use every_n_epochs: 1, every_n_train_steps: null and save_on_train_epoch_end: "
                f"false, which save after each validation"
            )


def _never_due(trainer: Any) -> Iterator[str]:
    epochs = trainer.max_epochs
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # max_time makes one
    if trainer.max_steps == -1 and not timed and epochs not in (None, -1):
        yield (
            f"max_epochs: {epochs} never ends this run, its training data is one epoch without an end: set max_steps "
            f"(iterations) or max_time, or limit_train_batches to the iterations of an epoch"
        )
    if trainer.min_epochs and trainer.min_epochs > 1:
        yield f"min_epochs: {trainer.min_epochs} is never reached, the first epoch has no end: use min_steps"
    if trainer.reload_dataloaders_every_n_epochs:
        yield "reload_dataloaders_every_n_epochs does nothing, the first epoch has no end: leave it out"
    if (trainer.check_val_every_n_epoch or 1) > 1:
        yield (
            f"check_val_every_n_epoch: {trainer.check_val_every_n_epoch} never validates, the first epoch has no end: "
            f"set val_check_interval to a number of iterations, and check_val_every_n_epoch to null"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, ModelCheckpoint) and callback._every_n_epochs > 1:
            yield (
                f"ModelCheckpoint with every_n_epochs: {callback._every_n_epochs} never saves, the first epoch has no "
                f"end: use every_n_train_steps, or every_n_epochs: 1 to save after each validation"
            )
        elif isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end:
            yield "EarlyStopping with check_on_train_epoch_end never looks, the first epoch has no end: set it to false"
        elif isinstance(callback, Timer) and callback._interval == "epoch":
            yield "a Timer with interval epoch never stops, the first epoch has no end: use interval: step"

"""Checkpoints of sound weights only."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn


class SoundCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, which writes nothing while updates are skipped for a non-finite loss.

        >>> trainer = pl.Trainer(callbacks=[SoundCheckpoint(every_n_train_steps=1000, save_last=True)])

    Whoever resumes wants the weights from before that began, and an older file may be deleted for a new one. The
    ``unidad`` command has this callback. It asks the module's ``is_skipping``; one without it is always sound.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a trainer that would not see a checkpoint in this callback, and add one of its own.

        Raises:
            TypeError: the trainer is that of the package ``pytorch_lightning``.
        """
        if not isinstance(trainer, pl.Trainer):
            raise TypeError(
                f"SoundCheckpoint is a checkpoint for lightning.pytorch.Trainer, got {type(trainer).__module__}'s, "
                f"which adds another one to it: import lightning.pytorch as pl"
            )
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._is_sound(trainer, pl_module):
            super().on_train_batch_end(trainer, pl_module, *args)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_sound(trainer, pl_module):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_sound(trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning saves here what has not been saved yet, in a fast_dev_run too.
        if not trainer.fast_dev_run and self._is_sound(trainer, pl_module):  # type: ignore[attr-defined]
            super().on_train_end(trainer, pl_module)

    def _is_sound(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        if not getattr(pl_module, "is_skipping", False):
            return True
        every = self._every_n_train_steps
        if every and trainer.global_step % every == 0:
            rank_zero_warn(
                f"no checkpoint is written at iteration {trainer.global_step}: its update was skipped for a "
                f"non-finite loss or gradient; earlier ones are kept"
            )
        return False

"""Options that Lightning would leave aside without a word, or that would never end a run."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging

from tests.worlds import Stream, fit, random_images, unidad
from unidad_pl.training.refusals import refuse_endless, refuse_trainer

IDLE: list[tuple[dict[str, Any], str]] = [
    ({"gradient_clip_val": 1.0}, "optimizer.clip"),
    ({"gradient_clip_algorithm": "value"}, "optimizer.clip"),
    ({"accumulate_grad_batches": 2}, "training.accumulate"),
    ({"overfit_batches": 1}, "overfit_batches"),
    ({"callbacks": [ModelCheckpoint(train_time_interval=timedelta(minutes=1))]}, "train_time_interval never saves"),
    ({"callbacks": [ModelCheckpoint(monitor="val/fid", every_n_train_steps=2)], "limit_val_batches": 1},
     "ranks a checkpoint by the validation before it.*every_n_epochs: 1"),
    ({"callbacks": [ModelCheckpoint(monitor="val/fid")]}, "validation, which is off"),
    ({"callbacks": [EarlyStopping("val/fid")]}, "never looks at 'val/fid'"),
    ({"callbacks": [EMAWeightAveraging()]}, "training.ema_decay"),
]  # fmt: skip
NO_END: tuple[dict[str, Any], str] = ({"max_epochs": None, "max_steps": -1}, "max_epochs: 1000 never ends")
ENDLESS: list[tuple[dict[str, Any], str]] = [
    ({"max_epochs": 5, "max_steps": -1}, "max_epochs: 5 never ends"),
    ({"min_epochs": 2}, "min_epochs: 2 is never reached"),
    ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders"),
    ({"check_val_every_n_epoch": 2}, "check_val_every_n_epoch: 2 never validates"),
    ({"callbacks": [ModelCheckpoint(every_n_epochs=2)]}, "every_n_epochs: 2 never saves"),
    ({"callbacks": [EarlyStopping("loss", check_on_train_epoch_end=True)]}, "never looks"),
    ({"callbacks": [Timer(timedelta(hours=1), interval="epoch")]}, "interval: step"),
]


def trainer_with(folder: Path, **options: Any) -> pl.Trainer:
    checkpointing = any(isinstance(one, ModelCheckpoint) for one in options.get("callbacks", []))
    settings = dict(accelerator="cpu", max_steps=2, max_epochs=-1, logger=False, enable_checkpointing=checkpointing,
                    enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
                    default_root_dir=folder)  # fmt: skip
    return pl.Trainer(**(settings | options))


@pytest.mark.parametrize(("options", "message"), IDLE, ids=lambda value: str(value).partition(" object at")[0][:40])
def test_what_does_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=message):
        refuse_trainer(trainer_with(tmp_path, **options))


@pytest.mark.parametrize(("options", "message"), ENDLESS, ids=lambda value: str(value).partition(" object at")[0][:40])
def test_what_waits_for_the_end_of_an_endless_epoch(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, **options)
    refuse_trainer(trainer)
    trainer.fit_loop.max_batches = float("inf")
    with pytest.raises(RuntimeError, match=message):
        refuse_endless(trainer)


@pytest.mark.parametrize(("options", "message"), [IDLE[4], NO_END], ids=["idle", "endless"])
def test_a_fit_refuses_before_its_first_iteration(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    module = unidad()
    with pytest.raises(RuntimeError, match=message):
        trainer_with(tmp_path, **options).fit(module, Stream(random_images()))
    assert module.iteration == 0
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 2},
        {"max_epochs": -1, "max_steps": 2},
        {"max_epochs": None, "max_steps": -1, "max_time": timedelta(seconds=9)},
        {"callbacks": [ModelCheckpoint(monitor="loss/student", every_n_train_steps=2)]},
        {"callbacks": [EarlyStopping("val/fid", strict=False)], "limit_val_batches": 1},
    ],
    ids=",".join,
)
def test_what_works_is_not_refused(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, **options)
    refuse_trainer(trainer)
    trainer.fit_loop.max_batches = trainer.limit_train_batches if options.get("limit_train_batches") else float("inf")
    refuse_endless(trainer)


def test_the_way_out_saves_by_the_validation_that_has_just_run(tmp_path: Path) -> None:
    class Scores(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.log("val/fid", float(trainer.global_step))

    kept = ModelCheckpoint(tmp_path, monitor="val/fid", mode="max", every_n_epochs=1, save_on_train_epoch_end=False,
                           filename="{step}")  # fmt: skip
    fit(unidad(), 6, callbacks=[Scores(), kept], enable_checkpointing=True, limit_val_batches=1,
        val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0)  # fmt: skip
    assert os.listdir(tmp_path) == ["step=6.ckpt"]
    assert kept.best_model_score == 6

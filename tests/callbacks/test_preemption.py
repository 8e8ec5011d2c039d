"""Signals: in a fit they save, once and whole; elsewhere they end the process with a sentence."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.worlds import Layers, fit, unidad
from unidad_pl.callbacks.preemption import SIGNALS, Preemption, leaving_on_signals, listen


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


class Send(pl.Callback):
    """Signals to this process in the second iteration, and more of them while the checkpoint is written."""

    def __init__(self, *first: int, saving: tuple[int, ...] = ()) -> None:
        self.first, self.saving = first, saving

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for number in self.first if trainer.global_step == 1 else ():
            os.kill(os.getpid(), number)

    def on_save_checkpoint(self, *_: Any) -> None:
        for number in self.saving:
            os.kill(os.getpid(), number)


def stopped(folder: Path, send: Send) -> int | str | None:
    with pytest.raises(SystemExit) as ending:
        fit(unidad(Layers()), 4, callbacks=[send, Preemption()], default_root_dir=folder)
    return ending.value.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_fit_saves_and_says_how_to_go_on(number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stopped(tmp_path, Send(number)) == 85
    path = tmp_path / "checkpoints" / "preempted.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 2
    printed = capfd.readouterr().err
    assert f"trainer.fit(module, data, ckpt_path={str(path)!r})" in printed
    assert fit(unidad(Layers()), 3, ckpt_path=path).global_step == 3


def test_more_signals_do_not_disturb_the_save(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    many = (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGINT)
    assert stopped(tmp_path, Send(signal.SIGTERM, saving=many)) == 85
    assert torch.load(tmp_path / "checkpoints" / "preempted.ckpt", weights_only=True)["global_step"] == 2
    assert "this signal changes nothing" in capfd.readouterr().err


def test_the_second_ctrl_c_still_saves_and_the_third_leaves_at_once(tmp_path: Path) -> None:
    assert stopped(tmp_path / "two", Send(signal.SIGINT, signal.SIGINT)) == 85
    assert (tmp_path / "two" / "checkpoints" / "preempted.ckpt").is_file()
    assert stopped(tmp_path / "three", Send(signal.SIGINT, signal.SIGINT, signal.SIGINT)) == 128 + signal.SIGINT
    assert not (tmp_path / "three" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 85), (signal.SIGUSR1, 85)]
)
def test_outside_of_a_fit_it_ends_at_once(number: int, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending, leaving_on_signals():
        os.kill(os.getpid(), number)
    assert ending.value.code == code
    assert "ended at once" in capfd.readouterr().err


def test_what_was_ignored_stays_ignored() -> None:
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with leaving_on_signals():
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_forked_worker_leaves_ctrl_c_to_its_parent() -> None:
    caught: list[int] = []
    listen(lambda number, frame: caught.append(number))
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(7 + len(caught))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    os.kill(os.getpid(), signal.SIGINT)
    assert caught == [signal.SIGINT]

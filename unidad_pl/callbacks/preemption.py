"""End a run in good order on a signal: a fit finishes its iteration, saves, and says the command that goes on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from unidad_pl.callbacks.environment import unidad_command
from unidad_pl.callbacks.records import run_folder
from unidad_pl.checks import check_whole
from unidad_pl.store import ask

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""The end of a job, the warning before it, Ctrl-C, and the terminal that was closed."""
EXIT_CODE = 85
PATIENCE = 3
FILE = "preempted.ckpt"
KEY = "unidad_pl/stop_after"


class Preemption(pl.Callback):
    """On SIGTERM, SIGUSR1, SIGINT (Ctrl-C) or SIGHUP a fit finishes its iteration, saves, and exits.

        >>> trainer = pl.Trainer(callbacks=[Preemption(exit_code=99)])

    It saves ``checkpoints/preempted.ckpt``. More signals do not disturb that; before it has begun, the third Ctrl-C
    leaves at once. What was ignored when the process started, as SIGHUP under ``nohup``, stays ignored.

    With ``accumulate_grad_batches`` the iteration ends with the step of the optimizer. What callbacks and module do in
    ``on_train_batch_end`` is done before the checkpoint is written.

    All ranks stop after the same iteration, whichever of them got the signal, and exit with the same code. They agree
    through the store of the process group: no collective, and nothing that waits for a GPU. A signal outside the
    training loop, when there is nothing to save, ends the process at once; during a validation within that loop, the
    validation is finished first. This callback replaces Lightning's own handlers, which may act in the middle of an
    iteration.

    The ``unidad`` command has this callback; resume with ``--ckpt_path last``.

    Args:
        exit_code: of the process. Ranks that Lightning itself started as children of rank 0 exit with 0, because
            Lightning kills a job whose child fails.

    Raises:
        ValueError: ``exit_code`` is no whole number from 0 to 255.
    """

    def __init__(self, exit_code: int = EXIT_CODE) -> None:
        check_whole(0, 255, exit_code=exit_code)
        self.exit_code = exit_code
        self._caught: int | None = None
        self._training = self._saving = False
        self._iterations = self._interrupts = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training, self._saving, self._caught = True, False, None
        self._iterations = self._interrupts = 0
        listen(self._note)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        listen(self._note)  # Lightning restores the handlers it found when a loop ends

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._iterations += 1
        # A gradient that is still being summed up is in no checkpoint.
        summed_up = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if summed_up and self._stop_now(trainer):
            self._leave_after_the_others(trainer, pl_module)

    def _leave_after_the_others(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save when all callbacks and the module's own hook, which comes last, are done with the iteration."""
        own = module.on_train_batch_end

        def last(*args: Any) -> None:
            del module.on_train_batch_end
            own(*args)
            self._save_and_leave(trainer)

        module.on_train_batch_end = last  # type: ignore[method-assign, assignment]

    def _note(self, number: int, frame: Any) -> None:
        if not self._training:
            leave(number, self.exit_code)
        self._interrupts += number == signal.SIGINT
        if self._saving:
            say("the checkpoint is being written: this signal changes nothing, the process ends after it")
        elif self._interrupts >= PATIENCE:
            leave(number, self.exit_code)
        elif self._caught is None:
            say(f"{signal.Signals(number).name}: finishing this iteration, then saving a checkpoint")
        self._caught = number

    def _stop_now(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size == 1 or not dist.is_initialized():
            return self._caught is not None
        # The others may have looked already in this iteration, but none gets through the next without this rank.
        store = _get_default_store()

        def agreed() -> bool:
            if self._caught is not None:
                store.compare_set(KEY, "", str(self._iterations + 1))
            return bool(store.check([KEY])) and self._iterations >= int(store.get(KEY))

        return ask(agreed, store.timeout.total_seconds())  # type: ignore[attr-defined]

    def _save_and_leave(self, trainer: pl.Trainer) -> None:
        self._saving = True
        run = run_folder(trainer)
        path = Path(getattr(trainer.checkpoint_callback, "dirpath", None) or run / "checkpoints") / FILE
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            sys.exit(self.exit_code)
        trainer.save_checkpoint(path, weights_only=False)
        own_child = (
            type(getattr(trainer.strategy, "cluster_environment", None)).__name__ == "LightningEnvironment"
            and trainer.local_rank > 0
        )
        if trainer.is_global_zero:
            config = run / "config.yaml"
            going_on = f"trainer.fit(module, data, ckpt_path={str(path)!r})"
            if config.is_file():
                going_on = f"{unidad_command()} fit --config {shlex.quote(str(config))} --ckpt_path last"
            say(
                f"Stopped by a signal after iteration {trainer.global_step}, saved {path}, exit code {self.exit_code}. "
                f"To go on:\n{going_on}"
            )
        sys.exit(0 if own_child else self.exit_code)


def say(text: str) -> None:
    """Write a line to stderr, which may be interrupted in a write of its own, or be a terminal that is gone."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def leave(number: int, exit_code: int) -> NoReturn:
    """End this process where there is nothing to save: with ``exit_code``, on Ctrl-C and SIGHUP as shells expect it."""
    say(f"{signal.Signals(number).name}: ended at once, there was nothing to save")
    sys.exit(exit_code if number in SIGNALS[:2] else 128 + number)


def listen(handler: Any) -> None:
    """Call ``handler`` on :data:`SIGNALS`; only the main thread may ask for that.

    Workers of a data loader, forked from this process, are left to it: a Ctrl-C in a terminal reaches them too.
    """
    own = os.getpid()

    def of_this_process(number: int, frame: Any) -> None:
        if os.getpid() == own:
            handler(number, frame)
        elif number == signal.SIGTERM:
            os._exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, of_this_process)


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """A signal before and after the loops ends the process with a sentence."""
    before = [signal.getsignal(number) for number in SIGNALS]
    listen(lambda number, frame: leave(number, EXIT_CODE))
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(SIGNALS, before, strict=True):
                signal.signal(number, handler)

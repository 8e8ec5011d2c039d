"""End a run in good order when its time on the machine is over: on SIGTERM and SIGUSR1 it saves and exits."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.distributed_c10d import _get_default_store

from unidad_pl.callbacks.records import run_folder

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 85
FILE = "preempted.ckpt"
KEY = "unidad_pl/stop_after"


class Preemption(pl.Callback):
    """On SIGTERM or SIGUSR1 a fit finishes its iteration, saves ``checkpoints/preempted.ckpt`` and exits.

        >>> trainer = pl.Trainer(callbacks=[Preemption(exit_code=99)])

    All ranks stop after the same iteration, whichever of them got the signal, and exit with the same code. They agree
    through the store of the process group: no collective, and nothing that waits for a GPU. A signal outside the
    training loop, when there is nothing to save, ends the process at once; during a validation within that loop, the
    validation is finished first. This callback replaces Lightning's own handlers, which may act in the middle of an
    iteration.

    The ``unidad`` command has this callback; resume with ``--ckpt_path last``.

    Args:
        exit_code: of the process. Ranks that Lightning itself started as children of rank 0 exit with 0, because
            Lightning kills a job whose child fails.
    """

    def __init__(self, exit_code: int = EXIT_CODE) -> None:
        self.exit_code = exit_code
        self._caught: int | None = None
        self._training = False
        self._iterations = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training, self._iterations, self._caught = True, 0, None
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
        if self._stop_now(trainer):
            self._save_and_leave(trainer)

    def _note(self, number: int, frame: Any) -> None:
        if not self._training:
            sys.exit(self.exit_code)
        self._caught = number

    def _stop_now(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size == 1 or not dist.is_initialized():
            return self._caught is not None
        # The others may have looked already in this iteration, but none gets through the next without this rank.
        store = _get_default_store()
        if self._caught is not None:
            store.compare_set(KEY, "", str(self._iterations + 1))
        return bool(store.check([KEY])) and self._iterations >= int(store.get(KEY))

    def _save_and_leave(self, trainer: pl.Trainer) -> None:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or run_folder(trainer) / "checkpoints"
        path = Path(folder) / FILE
        trainer.save_checkpoint(path, weights_only=False)
        own_child = (
            isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
            and trainer.local_rank > 0
        )
        rank_zero_info(
            f"Stopped by a signal after iteration {trainer.global_step}, saved {path}, exit code {self.exit_code}. "
            f"Resume with --ckpt_path last"
        )
        sys.exit(0 if own_child else self.exit_code)


def listen(handler: Any) -> None:
    """Call ``handler`` on :data:`SIGNALS`; only the main thread may ask for that."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, handler)


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """A signal before and after the loops exits with :data:`EXIT_CODE`."""
    before = [signal.getsignal(number) for number in SIGNALS]
    listen(lambda number, frame: sys.exit(EXIT_CODE))
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(SIGNALS, before, strict=True):
                signal.signal(number, handler)

"""The progress of a run: phase, iterations and time left, on a terminal all the time, in a log file now and then."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, Timer
from tqdm import tqdm

from unidad_pl.modules.unidad import UniDAD

LIVE = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"
LOGGED = "{desc}: {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"
ENDLESS = "{desc}: {n_fmt}, {elapsed} gone, {rate_fmt}{postfix}"
REDRAWN = 0.1
"""Seconds between two looks of a line on a terminal."""


def pause(elapsed: float) -> float:
    """Seconds until the next line in a file, ``elapsed`` seconds after the first: 10 at first, 600 at most.

    >>> [pause(elapsed) for elapsed in (0.0, 500.0, 86400.0)]
    [10.0, 50.0, 600.0]
    """
    return min(max(10.0, elapsed / 10), 600.0)


def phases(module: pl.LightningModule, last: float) -> list[tuple[str, float]]:
    """What a fit of ``last`` iterations does, in order: names, and the iterations that are done when each ends.

    >>> from unidad_pl import Diffusion, NewUNet
    >>> phases(Diffusion(NewUNet()), 100)
    [('training', 100)]
    """
    if not isinstance(module, UniDAD):
        return [("training", last)]
    until = (module.adaptation.until or last) if module.adaptation else 0
    ends = [("adapting T", module.pretrain), ("distilling and adapting T", until), ("distilling", last)]
    found: list[tuple[str, float]] = []
    for name, end in ends:
        if min(end, last) > (found[-1][1] if found else 0):
            found.append((name, min(end, last)))
    return found


class Line:
    """One line of progress: on a terminal drawn again and again, in a file written anew when :func:`pause` is over.

        >>> line = Line("drawing", total=3)
        >>> line.show(3)  # the last one is always shown
        drawing: 3/3, 00:00 gone, 00:00 left, ...it/s
        >>> line.close()

    Args:
        name: what is done.
        total: how often; infinity: nobody knows.
        first: how much was done before.
        below: leave the line of another one above alone, and vanish at the end.
    """

    def __init__(self, name: str, total: float, first: int = 0, below: bool = False) -> None:
        self.live = sys.stdout.isatty()
        bounded = math.isfinite(total)
        self.bar = tqdm(
            desc=name, total=int(total) if bounded else None, initial=first, leave=not below, position=int(below),
            file=sys.stdout if self.live else io.StringIO(), dynamic_ncols=self.live,
            bar_format=(LIVE if self.live else LOGGED) if bounded else ENDLESS,
        )  # fmt: skip
        self._began = time.monotonic()
        self._due = self._began + (REDRAWN if self.live else pause(0))
        self._shown = first

    def show(self, done: int, values: Callable[[], dict[str, Any]] = dict) -> None:
        """``done`` of the total are done; ``values``, which may wait for the device, are asked for if they are seen."""
        self.bar.n, now = done, time.monotonic()
        if now >= self._due or done == self.bar.total:
            self.bar.set_postfix(values(), refresh=False)
            self._due = now + (REDRAWN if self.live else pause(now - self._began))
            self._write()

    def _write(self) -> None:
        self._shown = self.bar.n
        if self.live:
            self.bar.refresh()
        else:
            sys.stdout.write(f"{self.bar}\n")
            sys.stdout.flush()

    def close(self) -> None:
        """The last state, if it was not shown yet."""
        if self._shown != self.bar.n:
            self._write()
        self.bar.close()


class PhaseBar(ProgressBar):
    """A line for each phase of a fit, such as ``adapting T`` and ``distilling``, with the time left of it.

        >>> PhaseBar().enabled
        True

    The phases cost different times, so each has its own rate. Works with any LightningModule, whose only phase is
    called ``training``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self._line: Line | None = None
        self._evaluation: Line | None = None
        self._evaluated = 0
        self._phases: list[tuple[str, float]] = []
        self._number = 0

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        with tqdm.external_write_mode():
            super().print(*args, **kwargs)

    # -- fit -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._phases, self._number = phases(pl_module, _iterations(trainer)), -1
        self._next_phase(trainer.global_step)

    def _next_phase(self, done: int) -> None:
        """Begin the line of the phase that comes after ``done`` iterations, if there is one."""
        self._close()
        numbers = [number for number, (_, end) in enumerate(self._phases) if done < end]
        if not numbers or not self.enabled:
            return
        self._number = numbers[0]
        name, end = self._phases[self._number]
        count = f" ({self._number + 1} of {len(self._phases)})" if len(self._phases) > 1 else ""
        self._line = Line(f"{name}{count}", end, done)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._line is not None:
            self._line.show(trainer.global_step, lambda: _values(trainer))
            if trainer.global_step >= self._phases[self._number][1]:
                self._next_phase(trainer.global_step)

    def on_train_end(self, *_: Any) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        for line in (self._evaluation, self._line):
            if line is not None:
                line.close()
        self._line = self._evaluation = None

    # -- evaluation ----------------------------------------------------------------------------------------------

    def _begin(self, name: str, batches: Any) -> None:
        total = sum(batches) if isinstance(batches, list) else batches
        if self.enabled:
            self._evaluated, self._evaluation = 0, Line(name, total, below=self._line is not None and self._line.live)

    def _advance(self, *_: Any) -> None:
        self._evaluated += 1
        if self._evaluation is not None:
            self._evaluation.show(self._evaluated)

    def _end(self, *_: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
        self._evaluation = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        checking = trainer.sanity_checking
        batches = trainer.num_sanity_val_batches if checking else trainer.num_val_batches
        self._begin("checking" if checking else "validating", batches)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("testing", trainer.num_test_batches)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("predicting", trainer.num_predict_batches)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _advance  # type: ignore[assignment]
    on_validation_end = on_test_end = on_predict_end = _end  # type: ignore[assignment]


def _iterations(trainer: pl.Trainer) -> float:
    """``global_step`` at the end of the fit; infinity where only time ends it."""
    bounds: Sequence[float] = [trainer.max_steps] if trainer.max_steps >= 0 else []
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is not None and epochs >= 0 and not bounds:
        bounds = [epochs * math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else math.inf]
    return min(bounds, default=math.inf)


def _values(trainer: pl.Trainer) -> dict[str, Any]:
    """What modules log for the bar, and when ``max_time`` ends the run."""
    found: dict[str, Any] = dict(trainer.progress_bar_metrics)
    timer = next((one for one in trainer.callbacks if isinstance(one, Timer)), None)  # type: ignore[attr-defined]
    left = None if timer is None else timer.time_remaining()
    return found if left is None else found | {"max_time in": tqdm.format_interval(max(0.0, left))}

"""Backward passes and optimiser steps by hand: each loss into its own group, one all-reduce per step, a guard."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import Tensor

from unidad_pl.modules.optimization import Optimization, average_gradients, spoil_gradients
from unidad_pl.sharding import is_sliced, whole


class ManualSteps(pl.LightningModule):
    """Steps the groups of parameters of a module, so that ``trainer.global_step`` counts an iteration once."""

    clock: str
    """The group that steps in every iteration; ``trainer.global_step`` counts its steps."""
    accumulate: int
    max_skipped: int
    iteration: Tensor
    _skipped_in_a_row: dict[str, int]

    def optimizations(self) -> dict[str, Optimization]:
        """Group name -> its optimiser settings, in the order they step."""
        raise NotImplementedError

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """Group name -> torch parameter groups, the same names as :meth:`optimizations`."""
        raise NotImplementedError

    def _optimizer(self, group: str) -> tuple[Any, Any]:
        position = list(self.optimizations()).index(group)
        optimizers: Any = self.optimizers(use_pl_optimizer=True)
        schedules: Any = self.lr_schedulers()
        if not isinstance(optimizers, list):
            return optimizers, schedules
        return optimizers[position], schedules[position]

    @property
    def _scaler(self) -> Any:
        """The loss scaler of ``16-mixed``, None in other precisions."""
        plugin = self.trainer.precision_plugin
        return plugin.scaler if isinstance(plugin, MixedPrecision) else None

    def backward_into(self, loss: Tensor, group: str) -> None:
        """Add the gradient of ``loss / accumulate`` to the parameters of ``group``, and to nothing else."""
        parameters = [p for settings in self.groups()[group] for p in settings["params"]]
        if is_sliced(parameters[0]):
            self._backward_into_slices(loss / self.accumulate, group)
        else:
            self.manual_backward(loss / self.accumulate, inputs=parameters)
        spoil_gradients(parameters, loss)

    def _backward_into_slices(self, loss: Tensor, group: str) -> None:
        """A slice is no leaf of the graph: what the loss leaves in other groups is dropped afterwards."""
        others = [p for name, own in self.groups().items() if name != group for part in own for p in part["params"]]
        held = [p.grad for p in others]
        for p in others:
            p.grad = None
        self.manual_backward(loss)
        for p, grad in zip(others, held, strict=True):
            p.grad = grad

    def step(self, group: str) -> bool:
        """Average the group's gradient over ranks, clip it, step its optimiser and schedule.

        A non-finite loss or gradient skips the step (on every rank alike: the average spreads it), is counted and
        logged.

        Returns:
            Whether the optimiser stepped.

        Raises:
            RuntimeError: ``max_skipped`` steps in a row were skipped.
        """
        optimizer, schedule = self._optimizer(group)
        parameters = [p for settings in optimizer.param_groups for p in settings["params"] if p.grad is not None]
        average_gradients(parameters)
        if self._scaler is not None:
            self._scaler.unscale_(optimizer.optimizer)
        clip = self.optimizations()[group].clip
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, clip if clip else math.inf))
        finite = bool(torch.isfinite(norm))
        self.log(f"grad_norm/{group}", norm, rank_zero_only=True)
        if finite:
            self._advance(group, optimizer)
            schedule.step()
            self._skipped_in_a_row[group] = 0
        else:
            self._skip(group)
        optimizer.zero_grad()
        return finite

    def _advance(self, group: str, optimizer: Any) -> None:
        """One step of the optimiser; Lightning's counter sees the clock's steps only."""
        if self._scaler is not None:
            # Lightning would unscale again, and change the scale before the other groups are unscaled.
            Precision.optimizer_step(self.trainer.precision_plugin, optimizer.optimizer, self, lambda: None)
            self._count(group)
        elif group == self.clock:
            optimizer.step()
        else:
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)

    def _count(self, group: str) -> None:
        if group == self.clock:
            progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.increment_ready()
            progress.increment_completed()

    def _skip(self, group: str) -> None:
        self._count(group)  # an iteration all the same
        row = self._skipped_in_a_row[group] = self._skipped_in_a_row.get(group, 0) + 1
        self.log(f"skipped/{group}", float(row), rank_zero_only=True)
        if row >= self.max_skipped:
            raise RuntimeError(
                f"{row} iterations in a row had a non-finite loss or gradient for {group!r} (now at iteration "
                f"{int(self.iteration)}). The last checkpoint is untouched: resume from it in 32-true, or begin again "
                f"with a lower learning rate."
            )

    def update_scale(self) -> None:
        """Let the loss scale of ``16-mixed`` follow what this iteration's gradients were like, once for all groups."""
        if self._scaler is not None:
            self._scaler.update()

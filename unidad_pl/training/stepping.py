"""Manual optimisation: each loss into its own group, one all-reduce per update of a group, a guard."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import Tensor, nn

from unidad_pl.strategies.fsdp import full, is_sharded, local_shard
from unidad_pl.training.optimization import OptimizerOptions
from unidad_pl.training.refusals import refuse_endless, refuse_trainer

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


class ManualOptimization(pl.LightningModule):
    """Updates groups of parameters by hand, so that ``trainer.global_step`` counts an iteration once.

    Args:
        clock: the group that is updated in every iteration; ``trainer.global_step`` counts its updates.
        accumulate: micro-batches whose gradients are averaged.
        max_skipped: iterations in a row with a non-finite loss or gradient after which the run ends.
        others: for the next class.
    """

    def __init__(self, clock: str, accumulate: int, max_skipped: int, **others: Any) -> None:
        super().__init__(**others)
        self.automatic_optimization = False
        self.clock, self.accumulate, self.max_skipped = clock, accumulate, max_skipped
        self.iteration = 0
        self._skipped_in_a_row: dict[str, int] = {}
        self._skipped: dict[str, int] = {}
        self._means: dict[str, Tensor] = {}
        self._steps: Counter[str] = Counter()  # of each group in this iteration
        self._overflowed = False  # where torch's scaler has not seen it

    def setup(self, stage: str) -> None:
        """Refuse what would run wrongly without an error, before anything has begun.

        Raises:
            RuntimeError: a strategy that cannot step our groups, a precision that the sigma range does not survive, or
                an option that would do nothing.
        """
        if stage == "fit":
            refuse_trainer(self.trainer)
        if self.trainer.precision not in PRECISIONS:
            raise RuntimeError(
                f"precision {self.trainer.precision!r} is not supported: use one of {', '.join(PRECISIONS)}"
            )

    def on_train_start(self) -> None:
        refuse_endless(self.trainer)
        self._forget_iteration()  # one that an error ended

    def optimizers_of_groups(self) -> dict[str, OptimizerOptions]:
        """Group name -> its optimiser settings, in the order they step."""
        raise NotImplementedError

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """Group name -> torch parameter groups, the same names as :meth:`optimizers_of_groups`."""
        raise NotImplementedError

    def trainer_options(self) -> dict[str, Any]:
        """What of the trainer a checkpoint remembers; these may change."""
        trainer = self.trainer
        return {"devices": trainer.world_size, "precision": trainer.precision, "max_steps": trainer.max_steps}

    def iteration_kind(self) -> object:
        """What the coming iteration costs: as much as any other one of an equal kind and batch size."""
        return "all"

    def _optimizer(self, group: str) -> tuple[Any, Any]:
        position = list(self.optimizers_of_groups()).index(group)
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
        if is_sharded(parameters[0]):
            self._backward_into_shards(loss / self.accumulate, group)
        else:
            self.manual_backward(loss / self.accumulate, inputs=parameters)
        spoil_gradients(parameters, loss)

    def _backward_into_shards(self, loss: Tensor, group: str) -> None:
        """A shard is no leaf of the graph: what the loss leaves in other groups is dropped afterwards."""
        others = [p for name, own in self.groups().items() if name != group for part in own for p in part["params"]]
        held = [p.grad for p in others]
        for p in others:
            p.grad = None
        self.manual_backward(loss)
        for p, grad in zip(others, held, strict=True):
            p.grad = grad

    def step(self, group: str) -> bool:
        """Average the group's gradient over ranks, clip it, step its optimiser and schedule.

        A non-finite loss or gradient skips the update (on every rank alike: the average spreads it), is counted and
        logged.

        Returns:
            Whether the optimiser stepped.

        Raises:
            RuntimeError: ``max_skipped`` updates in a row were skipped.
        """
        optimizer, schedule = self._optimizer(group)
        parameters = [p for settings in optimizer.param_groups for p in settings["params"] if p.grad is not None]
        average_gradients(parameters)
        self._unscale(group, optimizer.optimizer, parameters)
        clip = self.optimizers_of_groups()[group].clip
        norm = full(torch.nn.utils.clip_grad_norm_(parameters, clip if clip else math.inf))
        finite = bool(torch.isfinite(norm))
        self._steps[group] += 1
        self.log(f"grad_norm/{group}", norm, rank_zero_only=True)
        if finite:
            self._advance(group, optimizer)
            schedule.step()
            self._skipped_in_a_row[group] = 0
        else:
            self._skip(group)
        if skipped := self._skipped.get(group):
            self.log(f"skipped_in_all/{group}", float(skipped), rank_zero_only=True)  # not every step is logged
        optimizer.zero_grad()
        return finite

    def _unscale(self, group: str, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        """Take the loss scale of ``16-mixed`` out of gradients. torch's scaler does it once for an optimiser between
        two changes of the scale: later steps of a group in one iteration are unscaled here."""
        if self._scaler is None:
            return
        if not self._steps[group]:
            self._scaler.unscale_(optimizer)
        elif parameters:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / self._scaler.get_scale())

    def _advance(self, group: str, optimizer: Any) -> None:
        """One update; Lightning's counter sees the clock's only."""
        if self._scaler is not None:
            # Lightning would unscale again, and change the scale before the other groups are unscaled.
            Precision.optimizer_step(self.trainer.precision_plugin, optimizer.optimizer, self, lambda: None)
            self.count(group)
        elif group == self.clock:
            optimizer.step()
        else:
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)

    def count(self, group: str) -> None:
        """Advance ``trainer.global_step`` where ``group`` is the clock, although its optimiser did not step."""
        if group == self.clock:
            progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.increment_ready()
            progress.increment_completed()

    def _skip(self, group: str) -> None:
        self.count(group)
        self._overflowed |= self._steps[group] > 1
        row = self._skipped_in_a_row[group] = self._skipped_in_a_row.get(group, 0) + 1
        self._skipped[group] = self._skipped.get(group, 0) + 1
        self.log(f"skipped/{group}", float(row), rank_zero_only=True)
        if row >= self.max_skipped:
            raise RuntimeError(
                f"{row} iterations in a row had a non-finite loss or gradient for {group!r} (now at iteration "
                f"{self.iteration}). Resume from the last checkpoint in 32-true precision, or begin again with a lower "
                f"learning rate."
            )

    @property
    def is_skipping(self) -> bool:
        """Whether the latest update of some group was skipped."""
        return any(self._skipped_in_a_row.values())

    def log_mean(self, name: str, value: Tensor, prog_bar: bool = False) -> Tensor:
        """Log the mean of ``value`` over the micro-batches of this iteration, as far as they have come.

        Returns:
            ``value``, with its graph.
        """
        logged = value.detach()
        if self.accumulate > 1:
            logged = self._means[name] = self._means.get(name, 0) + logged / self.accumulate
        self.log(name, logged, prog_bar=prog_bar, rank_zero_only=True)
        return value

    def close_iteration(self) -> None:
        """All groups have stepped: the loss scale of ``16-mixed`` follows what their gradients were like, once for all
        of them, and means begin anew."""
        if self._scaler is not None:
            lower = self._scaler.get_scale() * self._scaler.get_backoff_factor() if self._overflowed else None
            self._scaler.update(lower)
        self._forget_iteration()

    def _forget_iteration(self) -> None:
        self._means.clear()
        self._steps.clear()
        self._overflowed = False


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their mean over all ranks: one all-reduce per dtype. Nothing on a single process.

    Gradients of sharded parameters are left alone: the backward pass has averaged them.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    grads = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
    for dtype in {g.dtype for g in grads}:
        same = [g for g in grads if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in same])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for g, part in zip(same, flat.split([g.numel() for g in same]), strict=True):
            g.copy_(part.view_as(g))


def spoil_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> None:
    """Make a gradient non-finite where its loss is, so that the average over ranks tells every rank to skip the step.

    Nothing is read back from the device, and a finite loss changes no gradient.
    """
    grads = (local_shard(p.grad) for p in parameters if p.grad is not None)
    grad = next((grad for grad in grads if grad.numel()), None)
    if grad is not None:
        grad[(0,) * grad.ndim] += (loss.detach() * 0).to(grad.dtype)

"""What the evaluation callbacks share: they watch the images that a val or test loop makes, and report at its end.

They change nothing in the training: networks live in the callback and not in the module, random states are restored,
no mode is switched. What they need of the module is in :mod:`unidad_pl.callbacks.outputs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from unidad_pl.callbacks.outputs import METHODS, OutputCallback, Samples
from unidad_pl.callbacks.records import FILE, append_record, on_rank_zero, run_folder, trained_iterations
from unidad_pl.metrics.gather import RowMetric, distinct_in_order

Stage = Literal["val", "test"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass
class Report:
    """What an evaluation found.

        >>> Report({"brightness": 0.5}, {"extractor": "mean"})
        Report(values={'brightness': 0.5}, details={'extractor': 'mean'})

    Attributes:
        values: metric name -> value; logged as ``<stage>/<name>``.
        details: what else belongs in the record.
    """

    values: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


class SeedRows(RowMetric):
    """The global numbers of all samples seen, over all ranks, and how many there were with repetitions."""

    def __init__(self) -> None:
        super().__init__()
        self.add_rows("seeds", 1, torch.long)

    def update(self, seeds: Tensor) -> None:
        self.append("seeds", seeds)

    def compute(self) -> tuple[Tensor, int]:
        seeds = self.rows("seeds")
        return seeds[distinct_in_order(seeds)], len(seeds)


class EvaluationCallback(OutputCallback):
    """Base: collects samples in val and test loops, logs values, appends them to ``<run folder>/metrics.jsonl``.

        >>> from torchmetrics import MeanMetric
        >>> class Brightness(EvaluationCallback):
        ...     def prepare(self, trainer, pl_module):
        ...         self.metric = MeanMetric()
        ...     def update(self, trainer, pl_module, images, seeds):
        ...         self.metric.update(images.mean((1, 2, 3)))
        ...     def finish(self, trainer, pl_module, stage):
        ...         return Report({"brightness": float(self.metric.compute())})
        >>> trainer = pl.Trainer(callbacks=[Brightness(stages=["test"])])  # trainer.test logs test/brightness

    A subclass implements :meth:`update` and :meth:`finish`, and where its attributes are not enough :meth:`prepare` and
    :meth:`begin`.

    Args:
        key: entry of the step's outputs that holds the images.
        dataloader_idx: with several val or test dataloaders, the one whose samples are evaluated.
        stages: where to evaluate: ``val``, ``test`` or both.

    Attributes:
        features: the extractor of a subclass that has one.
        metric: what a subclass collects in, if it does so in a metric.

    Raises:
        ValueError: an unknown stage, or none.
    """

    features: nn.Module | None = None
    metric: Metric | None = None

    def __init__(self, key: str = "samples", dataloader_idx: int = 0, stages: Sequence[Stage] = STAGES) -> None:
        check_some("stages", stages, Stage)
        super().__init__(key, stages, dataloader_idx)
        self._seeds = SeedRows()
        self._labels: Tensor | None = None
        self._prompts: list[str] | None = None
        self._weights: str | None = None
        self._size: tuple[int, int] | None = None
        self._warned: set[str] = set()

    # -- to be implemented by subclasses -------------------------------------------------------------------------

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check arguments and load networks, before the loops begin; by default :attr:`features`."""
        if self.features is not None:
            self.load_features(trainer, self.features)

    def begin(self, pl_module: pl.LightningModule) -> None:
        """Forget the last evaluation; by default :attr:`metric` does. Networks follow the module's device."""
        if self.features is not None:
            self.features.to(pl_module.device)
        if self.metric is not None:
            self.metric.to(pl_module.device).reset()

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        """Take images [B, 3, H, W] float32 in [-1, 1] and their global numbers [B] int64."""
        raise NotImplementedError

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report | None:
        """The result over all ranks, the same on each; None: nothing to log or record."""
        raise NotImplementedError

    # -- one evaluation ------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        loop = {"validate": "val", "test": "test"}.get(stage)
        if stage == "fit" or loop in self.stages:  # a fit is often followed by its test: fail before it
            with isolate_rng():
                self.prepare(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seeds.to(pl_module.device).reset()
        self._weights, self._size = None, None
        with isolate_rng():
            self.begin(pl_module)

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, samples: Samples) -> None:
        size = (samples.images.shape[2], samples.images.shape[3])
        if self._size not in (None, size):
            method = METHODS[self._stage(trainer)]
            raise ValueError(f"{type(self).__name__}: {method} returned samples of {size} after {self._size}")
        self._size, self._labels, self._prompts = size, samples.labels, samples.prompts
        self._weights = self._weights if samples.weights is None else samples.weights
        self._seeds.update(samples.seeds)
        with torch.no_grad(), isolate_rng():
            self.update(trainer, pl_module, samples.images, samples.seeds)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        seeds, seen = self._seeds.compute()
        seeds = seeds.reshape(-1)  # torchmetrics makes a scalar of a single number
        if not seen:
            raise RuntimeError(
                f"{type(self).__name__} saw no samples in the {stage} loop: no batch came from "
                f"dataloader_idx={self.dataloader_idx}"
            )
        size = torch.tensor(self._size or (0, 0), device=pl_module.device)
        height, width = trainer.strategy.all_gather(size).reshape(-1, 2).amax(0).tolist()
        self._size = (height, width)  # known on ranks without a sample too
        if seen > len(seeds):
            self.warn_once(
                f"{seen - len(seeds)} of {seen} {stage} samples carry a seed that came before; metrics count a seed "
                f"once. Return unique 'seeds' from the step if these are different images."
            )
        with torch.no_grad(), isolate_rng():
            report = self.finish(trainer, pl_module, stage)
        if report is None:
            return
        for name, value in report.values.items():
            pl_module.log(f"{stage}/{name}", value, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        self._record(trainer, stage, seeds, report)

    def _record(self, trainer: pl.Trainer, stage: str, seeds: Tensor, report: Report) -> None:
        path = run_folder(trainer) / FILE
        fitting = trainer.state.fn == TrainerFn.FITTING
        record = {
            "metric": type(self).__name__,
            "values": report.values,
            "stage": stage,
            "step": trained_iterations(trainer),
            "samples": len(seeds),
            "first_seed": int(seeds[0]),
            "last_seed": int(seeds[-1]),
            "resolution": list(self._size or ()),
            "weights": self._weights,
            "checkpoint": None if fitting or trainer.ckpt_path is None else str(trainer.ckpt_path),
            **report.details,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        on_rank_zero(trainer, path, lambda: append_record(path, record))

    # -- for subclasses ------------------------------------------------------------------------------------------

    def load_features(self, trainer: pl.Trainer, features: nn.Module) -> None:
        """Load a feature network on all ranks, the first process of every machine first (it may download).

        Raises:
            RuntimeError: on every rank, if it failed on one.
        """
        failure: Exception | None = None
        for first in (True, False):
            if (trainer.local_rank == 0) == first:
                try:
                    getattr(features, "load", lambda: None)()
                except (RuntimeError, OSError, ImportError, ValueError) as error:
                    failure = error
            if not trainer.strategy.reduce_boolean_decision(failure is None, all=True):
                where = f"{type(self).__name__} cannot begin: "
                raise RuntimeError(where + (str(failure) if failure else "loading failed on another rank")) from failure

    def needed_prompts(self) -> list[str]:
        """The prompts of the samples at hand.

        Raises:
            KeyError: the step returned none.
        """
        if self._prompts is None:
            raise KeyError(
                f"{type(self).__name__} needs to know what each sample was asked to show: return a list of as many "
                f"strings as samples under 'prompts' from validation_step and test_step"
            )
        return self._prompts

    def warn_once(self, message: str) -> None:
        """Warn on rank 0, the first time this message comes up."""
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(f"{type(self).__name__}: {message}")


def check_some(name: str, values: Sequence[str], literal: Any) -> None:
    """Refuse an option that is not a choice of one or more values of ``literal``.

    Raises:
        ValueError: names the option and what it may hold.
    """
    if not values or not set(values) <= set(get_args(literal)):
        raise ValueError(f"{name} must be some of {', '.join(get_args(literal))}, got {list(values)}")


def feature_name(features: nn.Module) -> str:
    """The id of an extractor for the records: its ``name``, or its class."""
    return str(getattr(features, "name", type(features).__name__))

"""What the evaluation callbacks share: they watch the images that a val or test loop makes, and report at its end.

They change nothing in the training: networks live in the callback and not in the module, random states are restored,
no mode is switched. What they need of the module is in :mod:`unidad_pl.callbacks.outputs`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
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

from unidad_pl.callbacks.cost import Cost
from unidad_pl.callbacks.outputs import METHODS, OutputCallback, Samples
from unidad_pl.callbacks.records import FILE, append_record, on_rank_zero, run_folder, trained_iterations
from unidad_pl.checks import check_whole
from unidad_pl.metrics.gather import RowMetric, distinct_in_order
from unidad_pl.metrics.weights import weight_versions

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
        name: put before the names of all values and files, so that two callbacks of one kind can be used together:
            ``<stage>/<name>_<value>``. Where a kind has a main value (``fid``), it is put in its place.

    Attributes:
        features: the extractor of a subclass that has one.
        metric: what a subclass collects in, if it does so in a metric.
        main: the value that ``name`` replaces, in a subclass that has one.
        needs_prompts: whether the step must return ``prompts``.

    Raises:
        ValueError: an unknown stage or none, an empty name, or a number out of range. In ``setup``: two callbacks would
            log under one name, or write one file.
    """

    features: nn.Module | None = None
    metric: Metric | None = None
    main: str = ""
    needs_prompts: bool = False

    def __init__(
        self,
        key: str = "samples",
        dataloader_idx: int = 0,
        stages: Sequence[Stage] = STAGES,
        name: str | None = None,
    ) -> None:
        check_some("stages", stages, Stage)
        check_whole(0, dataloader_idx=dataloader_idx)
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise ValueError(f"{type(self).__name__} needs a name to log its values under, got name={name!r}")
        super().__init__(key, stages, dataloader_idx)
        self.name = name
        self._logged: set[str] = set()
        self._any_below_zero = False
        self._seeds = SeedRows()
        self._labels: Tensor | None = None
        self._prompts: list[str] | None = None
        self._weights: str | None = None
        self._size: tuple[int, int] | None = None
        self._warned: set[str] = set()
        self._warned_of_range = False
        self._versions: list[list[int]] | None = None

    # -- to be implemented by subclasses -------------------------------------------------------------------------

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check arguments and load networks, before the loops begin; by default :attr:`features`."""
        if self.features is not None:
            self.load_features(trainer, self.features)

    def begin(self, pl_module: pl.LightningModule) -> None:
        """Forget the last evaluation; by default :attr:`metric` does. Networks follow the module's device."""
        if self.features is not None:
            self.features.to(pl_module.device)
        networks = (self.features, self.metric) if self.metric is not None else (self.features,)
        versions = [weight_versions(network) for network in networks if network is not None]
        if versions != self._versions:
            self._versions = versions
            self.forget()
        if self.metric is not None:
            self.metric.to(pl_module.device).reset()

    def forget(self) -> None:
        """Drop what was found of given images: the extractor has other weights than at the last evaluation."""

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        """Take images [B, 3, H, W] float32 in [-1, 1] and their global numbers [B] int64."""
        raise NotImplementedError

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report | None:
        """The result over all ranks, the same on each; None: nothing to log or record."""
        raise NotImplementedError

    def produces(self) -> Sequence[str]:
        """Names of the values that :meth:`finish` will report or files it will write, as far as they are known."""
        return ()

    def inspect(self, trainer: pl.Trainer, samples: Samples) -> None:
        """Refuse what a sanity step, or the first of an evaluation, returned if it cannot be evaluated."""

    # -- one evaluation ------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        loop = {"validate": "val", "test": "test"}.get(stage)
        if stage == "fit" or loop in self.stages:  # a fit is often followed by its test: fail before it
            for other in self._others(trainer):
                if set(self.stages) & set(other.stages):
                    self._refuse_twice(other, set(self.named(self.produces())) & set(other.named(other.produces())))
            with isolate_rng():
                self.prepare(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        first = next((one for one in self._all(trainer) if "val" in one.stages), None)
        if self is first and trainer.limit_val_batches and not trainer.enable_validation:
            names = ", ".join(type(one).__name__ for one in self._all(trainer))
            rank_zero_warn(
                f"{names}: nothing is evaluated in this fit, because it has no validation: that needs a "
                f"validation_step and a val dataloader"
            )

    def _all(self, trainer: pl.Trainer) -> list[EvaluationCallback]:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return [one for one in callbacks if isinstance(one, EvaluationCallback)]

    def _others(self, trainer: pl.Trainer) -> list[EvaluationCallback]:
        return [other for other in self._all(trainer) if other is not self]

    def _refuse_twice(self, other: EvaluationCallback, names: Collection[str]) -> None:
        if names:
            raise ValueError(
                f"{type(other).__name__} and {type(self).__name__} both produce {', '.join(sorted(names))}: values "
                f"would be averaged, files overwritten. Give one of them another name=, e.g. "
                f"{type(self).__name__}(name={(self.main or 'other') + '_2'!r})"
            )

    def named(self, keys: Iterable[str]) -> list[str]:
        """``keys`` as they are logged: with :attr:`name` in place of :attr:`main`, or before them."""
        if self.name is None or self.name == self.main:
            return list(keys)
        own = self.main
        return [self.name + key[len(own) :] if own and key.startswith(own) else f"{self.name}_{key}" for key in keys]

    def _inspect(self, trainer: pl.Trainer, samples: Samples) -> None:
        self._prompts = samples.prompts
        if self.needs_prompts:
            self.needed_prompts()
        self.inspect(trainer, samples)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seeds.to(pl_module.device).reset()
        self._weights, self._size = None, None
        self._logged, self._any_below_zero = set(), False
        with isolate_rng():
            self.begin(pl_module)

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, samples: Samples) -> None:
        size = (samples.images.shape[2], samples.images.shape[3])
        if self._size not in (None, size):
            method = METHODS[self._stage(trainer)]
            raise ValueError(f"{type(self).__name__}: {method} returned samples of {size} after {self._size}")
        if self._size is None:
            self._inspect(trainer, samples)
        self._size, self._labels, self._prompts = size, samples.labels, samples.prompts
        if not samples.numbered and trainer.world_size > 1:
            self.warn_once(
                "the step returns no 'seeds': what a distributed sampler repeats, to give all ranks equally many "
                "batches, counts as further images"
            )
        self._weights = self._weights if samples.weights is None else samples.weights
        self._seeds.update(samples.seeds)
        self._any_below_zero = self._any_below_zero or bool((samples.images < 0).any())
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
        own = torch.tensor([*(self._size or (0, 0)), int(self._any_below_zero)], device=pl_module.device)
        height, width, below_zero = trainer.strategy.all_gather(own).reshape(-1, 3).amax(0).tolist()
        self._size = (height, width)  # known on ranks without a sample too
        alike = [other for other in self._others(trainer) if other.key == self.key and other._warned_of_range]
        if not below_zero and not alike:
            self._warned_of_range = True
            self.warn_once(
                f"no value of the {len(seeds)} {stage} samples is below 0, but images are floats in [-1, 1]: does "
                f"{METHODS[stage]} return [0, 1]? Then return 2 * images - 1"
            )
        if seen > len(seeds):
            self.warn_once(
                f"{seen - len(seeds)} of {seen} {stage} samples carry a seed that came before; metrics count a seed "
                f"once. Return unique 'seeds' from the step if these are different images."
            )
        with torch.no_grad(), isolate_rng():
            report = self.finish(trainer, pl_module, stage)
        if report is None:
            return
        report.values = dict(zip(self.named(report.values), report.values.values(), strict=True))
        self._logged = {f"{stage}/{name}" for name in report.values}
        for other in self._others(trainer):
            self._refuse_twice(other, self._logged & other._logged)
        for name, value in report.values.items():
            pl_module.log(f"{stage}/{name}", value, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        self._record(trainer, stage, seeds, report)

    def _record(self, trainer: pl.Trainer, stage: str, seeds: Tensor, report: Report) -> None:
        path = run_folder(trainer) / FILE
        fitting = trainer.state.fn == TrainerFn.FITTING
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        cost = next((one for one in callbacks if isinstance(one, Cost)), None)
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
            **({} if cost is None else {"tflops": cost.tflops}),
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

    def warn_once(self, message: str, once: str | None = None) -> None:
        """Warn on rank 0, the first time this message comes up, or one about the same matter ``once``."""
        if (once or message) not in self._warned:
            self._warned.add(once or message)
            rank_zero_warn(f"{type(self).__name__}: {message}")


def check_some(name: str, values: Sequence[str], literal: Any) -> None:
    """Refuse an option that is not a choice of one or more values of ``literal``.

    Raises:
        ValueError: names the option and what it may hold.
    """
    listed = not isinstance(values, str) and isinstance(values, Collection)
    if not listed or not values or not set(values) <= set(get_args(literal)):
        raise ValueError(f"{name} must be some of {', '.join(get_args(literal))}, got {values!r}")


def feature_name(features: nn.Module) -> str:
    """The id of an extractor for the records: its ``name``, or its class."""
    return str(getattr(features, "name", type(features).__name__))

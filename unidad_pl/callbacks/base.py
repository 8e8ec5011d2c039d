"""What the evaluation callbacks share: they watch the images a val or test loop makes, and report at its end.

A callback sees a LightningModule only through what its ``validation_step`` or ``test_step`` returns: a dict with
``samples`` [B, 3, H, W] in [-1, 1], and optionally ``seeds`` (B integers, the samples' global numbers), ``prompts`` (B
strings) and ``weights`` (``"ema"`` or ``"raw"``). So it works in any Lightning project. It changes nothing in the
training: networks live in the callback and not in the module, random states are restored, no mode is switched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from unidad_pl.callbacks.records import FILE, append_record, on_rank_zero, run_folder, trained_steps
from unidad_pl.callbacks.sources import check_range
from unidad_pl.metrics.gather import RowMetric, distinct_in_order, sample_indices

STAGES = ("val", "test")


@dataclass
class Report:
    """What an evaluation found.

    Attributes:
        values: metric name -> value; logged as ``<stage>/<name>``.
        details: what else belongs into the record.
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


class EvaluationCallback(pl.Callback):
    """Base: collects samples in val and test loops, logs values, appends them to ``<run folder>/metrics.jsonl``.

    A subclass implements :meth:`prepare`, :meth:`begin`, :meth:`update` and :meth:`finish`.

    Args:
        key: entry of the step's outputs that holds the images.
        dataloader_idx: with several val or test dataloaders, the one whose samples are evaluated.
        stages: where to evaluate: ``val``, ``test`` or both.

    Raises:
        ValueError: an unknown stage.
    """

    def __init__(self, key: str = "samples", dataloader_idx: int = 0, stages: Sequence[str] = STAGES) -> None:
        if not stages or any(stage not in STAGES for stage in stages):
            raise ValueError(f"stages must be some of {', '.join(STAGES)}, got {list(stages)}")
        self.key, self.dataloader_idx, self.stages = key, dataloader_idx, tuple(stages)
        self._seeds: SeedRows | None = None
        self._seen = 0
        self._labels: Tensor | None = None
        self._prompts: list[str] | None = None
        self._weights: str | None = None
        self._size: tuple[int, int] | None = None
        self._warned: set[str] = set()

    # -- to be implemented by subclasses -------------------------------------------------------------------------

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check arguments and load networks, before the loops begin."""

    def begin(self, pl_module: pl.LightningModule) -> None:
        """Forget the last evaluation."""

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        """Take images [B, 3, H, W] float32 in [-1, 1] and their global numbers [B] int64."""
        raise NotImplementedError

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report | None:
        """The result over all ranks, the same on each; None: nothing to log or record."""
        raise NotImplementedError

    # -- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        loop = {"validate": "val", "test": "test"}.get(stage)
        if stage == "fit" or loop in self.stages:  # a fit is often followed by its test: fail before it
            with isolate_rng():
                self.prepare(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, pl_module, "test")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, pl_module, "val", outputs, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, pl_module, "test", outputs, dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "test")

    # -- one evaluation ------------------------------------------------------------------------------------------

    def _active(self, trainer: pl.Trainer, stage: str) -> bool:
        return stage in self.stages and not trainer.sanity_checking

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self._active(trainer, stage):
            return
        self._seeds = SeedRows().to(pl_module.device)
        self._seen, self._weights, self._size = 0, None, None
        with isolate_rng():
            self.begin(pl_module)

    def _collect(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, outputs: Any, dataloader_idx: int
    ) -> None:
        if not self._active(trainer, stage) or dataloader_idx != self.dataloader_idx:
            return
        step = "validation_step" if stage == "val" else "test_step"
        images, seeds = read_outputs(outputs, self.key, f"{type(self).__name__}: {step}", self._seen)
        self._seen += len(images)
        if self._size not in (None, tuple(images.shape[2:])):
            raise ValueError(
                f"{type(self).__name__}: {step} returned samples of {tuple(images.shape[2:])} after {self._size}"
            )
        self._size = (images.shape[2], images.shape[3])
        self._weights = str(outputs["weights"]) if "weights" in outputs else self._weights
        assert self._seeds is not None
        self._seeds.update(seeds)
        self._labels = read_labels(outputs, len(images))
        self._prompts = read_prompts(outputs, len(images))
        with torch.no_grad(), isolate_rng():
            self.update(trainer, pl_module, images, seeds)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self._active(trainer, stage):
            return
        assert self._seeds is not None
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
            "step": trained_steps(trainer),
            "samples": len(seeds),
            "first_seed": int(seeds[0]),
            "last_seed": int(seeds[-1]),
            "resolution": list(self._size or ()),
            "weights": self._weights,
            "checkpoint": None if fitting or trainer.ckpt_path is None else str(trainer.ckpt_path),
            **report.details,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        on_rank_zero(trainer, str(path), lambda: append_record(path, record))

    # -- for subclasses ------------------------------------------------------------------------------------------

    def load_features(self, trainer: pl.Trainer, features: nn.Module) -> None:
        """Make a feature network on all ranks, the first process of every machine first (it may download).

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


def read_labels(outputs: Mapping[str, Any], count: int) -> Tensor | None:
    """The entry ``labels`` of a step's outputs, class numbers [count], if it is there and is that."""
    labels = outputs.get("labels")
    fits = isinstance(labels, Tensor) and labels.shape == (count,) and not labels.is_floating_point()
    return labels if fits else None


def read_prompts(outputs: Mapping[str, Any], count: int) -> list[str] | None:
    """The entry ``prompts`` of a step's outputs, ``count`` strings, if it is there and is that."""
    prompts = outputs.get("prompts")
    fits = isinstance(prompts, (list, tuple)) and len(prompts) == count and all(isinstance(p, str) for p in prompts)
    return list(prompts) if fits and prompts is not None else None


def feature_name(features: nn.Module) -> str:
    """The id of an extractor for the records: its ``name``, or its class."""
    return str(getattr(features, "name", type(features).__name__))


def read_outputs(outputs: Any, key: str, where: str, seen: int) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] float32 in [-1, 1] and their global numbers [B] int64 from what a step returned.

    Args:
        outputs: the step's return value.
        key: entry with the images; one channel is repeated to three.
        where: begin of error messages.
        seen: samples this rank returned before; numbers follow from it if there is no entry ``seeds``.

    Raises:
        TypeError: no dict.
        KeyError: no such entry; names those there are.
        ValueError: no images, values outside [-1, 1], or another number of seeds.
    """
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"{where} must return a dict with the generated images under {key!r}, got {type(outputs).__name__}"
        )
    if key not in outputs:
        raise KeyError(f"{where} returned no {key!r}, only {', '.join(map(repr, outputs))}: return it, or set key=")
    images = outputs[key]
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        seen_type = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{where}: {key!r} must be a tensor [B, 3, H, W], got {seen_type}")
    if not images.is_floating_point():
        raise ValueError(f"{where}: {key!r} must be floats in [-1, 1], got {images.dtype}")
    check_range(images, f"{where}: {key!r}")
    images = images.detach().float().expand(-1, 3, -1, -1)
    return images, sample_indices(len(images), outputs.get("seeds"), seen).to(images.device)

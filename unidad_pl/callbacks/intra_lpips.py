"""Intra-LPIPS and memorisation of the generated images with respect to the shots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from unidad_pl.callbacks.base import STAGES, EvaluationCallback, Report, feature_name
from unidad_pl.callbacks.sources import Images, ImageSource, model_range
from unidad_pl.metrics import intra_lpips as metric
from unidad_pl.metrics.features import LPIPSFeatures


class IntraLPIPS(EvaluationCallback):
    """Logs ``<stage>/intra_lpips``, ``memorised`` and ``empty_clusters``; see :mod:`unidad_pl.metrics.intra_lpips`.

    ``memorised`` is the share of samples nearer than ``threshold`` to a shot. The record in ``metrics.jsonl`` also has
    the clusters one by one, and the mean with small clusters counted as 0.

    Args:
        features: extractor; default LPIPS-VGG, whose weights must be there before training begins.
        protocol: ``cdc`` or ``crdi``; see :class:`unidad_pl.metrics.IntraLPIPS`.
        cap: most members of a cluster that are compared; default 50 (``cdc``) or 100 (``crdi``).
        threshold: distance to a shot below which a sample counts as memorised.
        shots: folder or tensor [k, 3, H, W] (uint8, or float in [-1, 1]). Default: ``trainer.datamodule.shots``.
        relative: also log ``intra_lpips_relative``: the value over that of the reference images, the share of the
            target domain's diversity that was kept.
        reference: images for ``relative``. Default: ``trainer.datamodule.reference``.
        name: what it is logged as. With another name than ``intra_lpips`` the others are called ``<name>_memorised``
            and so on, so that several of these callbacks can be used together.
        batch_size: images per pass of the extractor.
        key: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.
        dataloader_idx: see there.
        stages: see there.

    Raises:
        ValueError: an unknown protocol, or a number out of range.
    """

    def __init__(
        self,
        features: nn.Module | None = None,
        protocol: metric.Protocol = "cdc",
        cap: int | None = None,
        threshold: float = 0.1,
        shots: Images = None,
        relative: bool = False,
        reference: Images = None,
        name: str = "intra_lpips",
        batch_size: int = 8,
        key: str = "samples",
        dataloader_idx: int = 0,
        stages: Sequence[str] = STAGES,
    ) -> None:
        super().__init__(key, dataloader_idx, stages)
        if not name:
            raise ValueError("IntraLPIPS needs a name to log its value under")
        self.features = LPIPSFeatures("vgg") if features is None else features
        self._metric = metric.IntraLPIPS(self.features, protocol, cap, threshold, batch_size)
        self.shots = ImageSource("IntraLPIPS", "shots", shots)
        self.relative, self.name = relative, name
        self.reference = ImageSource("IntraLPIPS(relative=True)", "reference", reference)
        self._shots_set = False
        self._reference_value: float | None = None

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.load_features(trainer, self.features)
        self.shots.check(trainer)
        if self.relative:
            self.reference.check(trainer)
        self._shots_set, self._reference_value = False, None  # another run may have other images

    def begin(self, pl_module: pl.LightningModule) -> None:
        self._metric.to(pl_module.device).reset()

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self._set_shots(trainer)
        self._metric.update(images, seeds)

    def _set_shots(self, trainer: pl.Trainer) -> None:
        if not self._shots_set:
            assert self._size is not None
            shots = self.shots.load(trainer, self._size)
            self._metric.set_shots(model_range(shots.to(self._metric.device)))
            self._shots_set = True

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        self._set_shots(trainer)  # a rank that got no sample takes part in the gathering
        result = self._metric.compute()
        prefix = "" if self.name == "intra_lpips" else f"{self.name}_"
        values = {
            self.name: result.mean,
            f"{prefix}memorised": result.memorised,
            f"{prefix}empty_clusters": float(result.empty_clusters),
        }
        if math.isnan(result.mean):
            self.warn_once(f"{self.name} is NaN: no cluster has two samples; draw more than the number of shots")
        details: dict[str, Any] = {
            "protocol": self._metric.protocol,
            "cap": self._metric.cap,
            "threshold": self._metric.threshold,
            "extractor": feature_name(self.features),
            "shots": len(result.cluster_sizes),
            **{name: value for name, value in vars(result).items() if name not in ("mean", "memorised")},
        }
        if self.relative:
            if self._reference_value is None:
                self._reference_value, details["reference"] = self._on_reference(trainer)
            known = self._reference_value
            values[f"{self.name}_relative"] = result.mean / known if known else math.nan
            details["intra_lpips_of_reference"] = known
        return Report(values, details)

    def _on_reference(self, trainer: pl.Trainer) -> tuple[float, int]:
        """The same number on the reference images, shared out over ranks, and how many they are."""
        assert self._size is not None
        images = self.reference.load(trainer, self._size)
        self._metric.reset()
        device = self._metric.device
        for numbers in torch.arange(trainer.global_rank, len(images), trainer.world_size).split(64):
            self._metric.update(model_range(images[numbers].to(device)), numbers)
        value = self._metric.compute().mean
        self._metric.reset()
        return value, len(images)

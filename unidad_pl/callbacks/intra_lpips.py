"""Intra-LPIPS and memorisation of the generated images with respect to the shots."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from unidad_pl.callbacks.base import EvaluationCallback, Report, feature_name
from unidad_pl.callbacks.given_images import GivenImages, Images, model_range
from unidad_pl.metrics.features import LPIPSFeatures
from unidad_pl.metrics.intra_lpips import IntraClusterLPIPS, Protocol


class IntraLPIPS(EvaluationCallback):
    """Logs ``<stage>/intra_lpips``, ``memorised`` and ``empty_clusters``; see :mod:`unidad_pl.metrics.intra_lpips`.

        >>> from unidad_pl import CartoonFeatures
        >>> trainer = pl.Trainer(callbacks=[IntraLPIPS(), IntraLPIPS(CartoonFeatures(), name="intra_cartoon")])

    ``memorised`` is the share of samples nearer than ``threshold`` to a shot. The record in ``metrics.jsonl`` also has
    the clusters one by one, and the mean with small clusters counted as 0.

    Args:
        features: extractor; default LPIPS-VGG, whose weights must be there before training begins.
        protocol: ``cdc`` or ``crdi``; see :class:`unidad_pl.metrics.IntraClusterLPIPS`.
        cap: how many members of a cluster are compared, at most; default 50 (``cdc``) or 100 (``crdi``).
        threshold: distance to a shot below which a sample counts as memorised.
        shots: folder or tensor [k, 3, H, W] (uint8, or float in [-1, 1]). Default: ``trainer.datamodule.shots``.
        relative: also log ``intra_lpips_relative``: the value over that of the reference images, the share of the
            target domain's diversity that was kept.
        reference: images for ``relative``. Default: ``trainer.datamodule.reference``.
        name: what the value is logged as. With another name than ``intra_lpips`` the others are called
            ``<name>_memorised`` and so on, so that several of these callbacks can be used together.
        batch_size: images per pass of the extractor.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: an unknown protocol, a number out of range, or an empty name.
    """

    def __init__(
        self,
        features: nn.Module | None = None,
        protocol: Protocol = "cdc",
        cap: int | None = None,
        threshold: float = 0.1,
        shots: Images = None,
        relative: bool = False,
        reference: Images = None,
        name: str = "intra_lpips",
        batch_size: int = 8,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not name:
            raise ValueError("IntraLPIPS needs a name to log its value under")
        self.features: nn.Module = LPIPSFeatures("vgg") if features is None else features
        self.metric: IntraClusterLPIPS = IntraClusterLPIPS(self.features, protocol, cap, threshold, batch_size)
        self.shots = GivenImages("IntraLPIPS", "shots", shots)
        self.relative, self.name = relative, name
        self.reference = GivenImages("IntraLPIPS(relative=True)", "reference", reference)

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().prepare(trainer, pl_module)
        self.shots.check(trainer)
        if self.relative:
            self.reference.check(trainer)
        self._shots_set = False  # another run may have other images
        self._reference_value: float | None = None

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self._set_shots(trainer)
        self.metric.update(images, seeds)

    def _set_shots(self, trainer: pl.Trainer) -> None:
        if not self._shots_set:
            shots = self.shots.load(trainer, self._size)
            self.metric.set_shots(model_range(shots.to(self.metric.device)))
            self._shots_set = True

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        self._set_shots(trainer)  # a rank that got no sample takes part in the gathering
        result = self.metric.compute()
        prefix = "" if self.name == "intra_lpips" else f"{self.name}_"
        values = {
            self.name: result.mean,
            f"{prefix}memorised": result.memorised,
            f"{prefix}empty_clusters": float(result.empty_clusters),
        }
        if math.isnan(result.mean):
            self.warn_once(f"{self.name} is NaN: no cluster has two samples; draw more than the number of shots")
        details: dict[str, Any] = {
            "protocol": self.metric.protocol,
            "cap": self.metric.cap,
            "threshold": self.metric.threshold,
            "extractor": feature_name(self.features),
            "shots": len(result.cluster_sizes),
            **{name: value for name, value in vars(result).items() if name not in ("mean", "memorised")},
        }
        if self.relative:
            if self._reference_value is None:
                self._reference_value, details["reference"] = self._of_reference(trainer)
            known = self._reference_value
            values[f"{self.name}_relative"] = result.mean / known if known else math.nan
            details["intra_lpips_of_reference"] = known
        return Report(values, details)

    def _of_reference(self, trainer: pl.Trainer) -> tuple[float, int]:
        """The same number for the reference images, shared out over ranks, and how many they are."""
        self.metric.reset()
        for images, numbers in self.reference.share(trainer, self._size, self.metric.device, batch_size=64):
            self.metric.update(images, numbers)
        result = self.metric.compute()
        self.metric.reset()
        return result.mean, sum(result.cluster_sizes)

"""What FID and CMMD have in common: features of samples against those of reference images."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from unidad_pl.callbacks.base import EvaluationCallback, feature_name
from unidad_pl.callbacks.given_images import GivenImages, Images, own_share, share
from unidad_pl.callbacks.outputs import Samples
from unidad_pl.checks import check_whole
from unidad_pl.metrics.cache import ReferenceCache
from unidad_pl.metrics.features import check_network, extract
from unidad_pl.metrics.two_sample import TwoSample


class ReferenceCallback(EvaluationCallback):
    """Base: collects features of the samples; those of the reference are computed once, shared out over ranks, and
    again only where the reference set has changed.

        >>> from unidad_pl.metrics import LPIPSFeatures
        >>> class MeanDifference(ReferenceCallback):
        ...     def finish(self, trainer, pl_module, stage):
        ...         x, y, details = self.both(trainer)
        ...         return Report({"difference": float((x.mean(0) - y.mean(0)).norm())}, details)
        >>> from unidad_pl.callbacks import Report
        >>> trainer = pl.Trainer(callbacks=[MeanDifference(LPIPSFeatures("squeeze"), None, 50, True)])

    Args:
        features: extractor.
        reference: folder or tensor [N, 3, H, W] (uint8, or float in [-1, 1]), or a list of images; at least 2. None:
            ``trainer.datamodule.reference``.
        batch_size: images per pass of the extractor.
        cache: whether what was found of reference images is kept for other runs; see
            :class:`~unidad_pl.metrics.cache.ReferenceCache`.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: ``batch_size`` below 1. In ``setup``: fewer than 2 reference images.
        TypeError: ``features`` is no module.
    """

    features: nn.Module
    metric: TwoSample

    def __init__(
        self, features: nn.Module, reference: Images, batch_size: int, cache: bool | str, **common: Any
    ) -> None:
        super().__init__(**common)
        check_whole(1, batch_size=batch_size)
        check_network(features=features)
        self.features, self.batch_size = features, batch_size
        self.reference = GivenImages(type(self).__name__, "reference", reference)
        self.cache, self.metric = ReferenceCache(cache), TwoSample(keep_reference=True)
        self._ready = False
        self._new: str | None = None

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().prepare(trainer, pl_module)
        self.reference.check(trainer, least=2)
        self._ready = False  # another run may have another reference set
        if self.reference.are_shots(trainer):
            self.warn_once(
                "the reference images are the shots themselves: values say how closely the shots are copied, not how "
                "well their domain is met. Give other images of it as the reference"
            )

    def forget(self) -> None:
        self._ready = False
        self.reference.forget()

    def inspect(self, trainer: pl.Trainer, samples: Samples) -> None:
        self.reference.check_size(trainer, (samples.images.shape[2], samples.images.shape[3]))

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self.metric.update(extract(self.features, images, self.batch_size), real=False, indices=seeds)

    def _add_reference(self, trainer: pl.Trainer) -> None:
        self.metric.forget_reference()
        every, device = self.reference.load(trainer, self._size), self.metric.device
        key = self.cache.key(every, self.features, device, "features")
        if (known := self.cache.read(key)) is not None:
            own = own_share(trainer, len(every))
            self.metric.update(known["features"][own], real=True, indices=own)
            return
        self._new = key
        for images, numbers in share(trainer, every, device, self.batch_size):
            self.metric.update(extract(self.features, images, self.batch_size), real=True, indices=numbers)

    def both(self, trainer: pl.Trainer) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Features of samples [N, D] and reference [M, D] of all ranks, and what the record should say of them."""
        if not self._ready and self.reference.are_new(trainer, self._size):
            self._add_reference(trainer)
        self._ready = True
        x, y = (self.metric.compute()[kind] for kind in ("generated", "reference"))
        if trainer.is_global_zero:
            self.cache.write(self._new, {"features": y})
        self._new = None
        details: dict[str, Any] = {"reference": len(y), "extractor": feature_name(self.features)}
        if self.reference.are_shots(trainer):
            details["reference_is_shots"] = True
        return x, y, details

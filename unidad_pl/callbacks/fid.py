"""FID, KID and PRDC of the generated images against reference images."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from unidad_pl.callbacks.base import EvaluationCallback, Report, feature_name
from unidad_pl.callbacks.given_images import GivenImages, Images
from unidad_pl.metrics.features import InceptionFeatures, extract
from unidad_pl.metrics.frechet import frechet_distance
from unidad_pl.metrics.kernel import kid
from unidad_pl.metrics.prdc import prdc
from unidad_pl.metrics.two_sample import TwoSample, check_pair

NEIGHBOURS = 5
INCEPTION_RANK = 2048  # generated images from which Inception's covariance can have full rank
FEW_REFERENCES = 500


class FID(EvaluationCallback):
    """Logs ``<stage>/fid``, and ``kid``, ``precision``, ``recall``, ``density``, ``coverage`` from the same features.

        >>> from unidad_pl import CartoonFeatures
        >>> trainer = pl.Trainer(callbacks=[FID(), FID(CartoonFeatures(layer="pooled"), name="fid_cartoon")])

    The bias of FID depends on the numbers of images: compare only values with equal ``samples`` and ``reference`` in
    ``metrics.jsonl``. KID is unbiased. Reference features are computed once per run, shared out over ranks.

    Args:
        features: extractor; default Inception as FID defines it, whose weights must be there before training begins.
        kid: also the kernel distance.
        prdc: also precision, recall, density and coverage (5 neighbours).
        reference: folder or tensor [N, 3, H, W] (uint8, or float in [-1, 1]). Default:
            ``trainer.datamodule.reference``.
        name: what the distance is logged as. With another name than ``fid`` the others are called ``<name>_kid`` and so
            on, so that several of these callbacks can be used together.
        batch_size: images per pass of the extractor.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: ``batch_size`` below 1, or an empty name.
    """

    def __init__(
        self,
        features: nn.Module | None = None,
        kid: bool = True,
        prdc: bool = True,
        reference: Images = None,
        name: str = "fid",
        batch_size: int = 50,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if batch_size < 1 or not name:
            raise ValueError(f"FID needs batch_size >= 1 and a name, got {batch_size} and {name!r}")
        self.features: nn.Module = InceptionFeatures() if features is None else features
        self.kid, self.prdc, self.name, self.batch_size = kid, prdc, name, batch_size
        self.reference = GivenImages("FID", "reference", reference)

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().prepare(trainer, pl_module)
        self.reference.check(trainer)
        self.metric: TwoSample = TwoSample(keep_reference=True)
        self._has_reference = False  # another run may have another reference set

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self.metric.update(extract(self.features, images, self.batch_size), real=False, indices=seeds)

    def _add_reference(self, trainer: pl.Trainer) -> None:
        for images, numbers in self.reference.share(trainer, self._size, self.metric.device, self.batch_size):
            self.metric.update(extract(self.features, images, self.batch_size), real=True, indices=numbers)
        self._has_reference = True

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        if not self._has_reference:
            self._add_reference(trainer)
        x, y = self.metric.compute()
        check_pair(x, y, type(self).__name__)
        if isinstance(self.features, InceptionFeatures) and (len(x) < INCEPTION_RANK or len(y) < FEW_REFERENCES):
            self.warn_once(
                f"FID of {len(x)} generated against {len(y)} reference images is strongly biased upwards (advised: "
                f"{INCEPTION_RANK} and {FEW_REFERENCES} at least). Compare it only with FIDs of the same numbers; "
                f"KID is unbiased."
            )
        values = {self.name: frechet_distance(x, y)}
        prefix = "" if self.name == "fid" else f"{self.name}_"
        details: dict[str, Any] = {"reference": len(y), "extractor": feature_name(self.features)}
        if self.kid:
            values[f"{prefix}kid"], details["kid_std"] = kid(x, y)
            details["kid_subset_size"] = min(1000, len(x), len(y))
        if self.prdc:
            values |= {f"{prefix}{name}": value for name, value in prdc(x, y, NEIGHBOURS).items()}
            details["neighbours"] = NEIGHBOURS
        return Report(values, details)

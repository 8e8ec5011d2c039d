"""FID, KID and PRDC of the generated images against reference images."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from unidad_pl.callbacks.base import EvaluationCallback, Report, feature_name
from unidad_pl.callbacks.given_images import GivenImages, Images, own_share, share
from unidad_pl.callbacks.outputs import Samples
from unidad_pl.checks import check_whole
from unidad_pl.metrics.cache import ReferenceCache
from unidad_pl.metrics.features import InceptionFeatures, check_network, extract
from unidad_pl.metrics.frechet import frechet_distance
from unidad_pl.metrics.kernel import kid
from unidad_pl.metrics.prdc import NAMES, prdc
from unidad_pl.metrics.two_sample import TwoSample
from unidad_pl.metrics.wasserstein import sliced_wasserstein

NEIGHBOURS = 5
INCEPTION_RANK = 2048  # generated images from which Inception's covariance can have full rank
FEW_REFERENCES = 500


class FID(EvaluationCallback):
    """Logs ``<stage>/fid``, and ``kid``, ``precision``, ``recall``, ``density``, ``coverage`` from the same features.

        >>> from unidad_pl import CartoonFeatures
        >>> trainer = pl.Trainer(callbacks=[FID(), FID(CartoonFeatures(layer="pooled"), name="fid_cartoon")])

    The bias of FID depends on the numbers of images: compare only values with equal ``samples`` and ``reference`` in
    ``metrics.jsonl``. KID is unbiased. Reference features are computed once, shared out over ranks, and again
    only where the reference set has changed.

    With one sample FID is NaN. What else cannot be computed of so few images is left out, with a warning.

    Args:
        features: extractor; default Inception as FID defines it, whose weights must be there before training begins.
        kid: also the kernel distance.
        swd: also the sliced Wasserstein distance, which sees more of a distribution than its mean and covariance.
        prdc: also precision, recall, density and coverage (5 neighbours), which need 6 images of both kinds.
        reference: folder or tensor [N, 3, H, W] (uint8, or float in [-1, 1]), or a list of images; at least 2. Default:
            ``trainer.datamodule.reference``.
        name: what the distance is logged as. With another name than ``fid`` the others are called ``<name>_kid`` and so
            on, so that several of these callbacks can be used together.
        batch_size: images per pass of the extractor.
        cache: whether what was found of reference images is kept for other runs, by their content and the extractor's;
            or a folder to keep it in. Default: ``$XDG_CACHE_HOME/unidad_pl/references``. Extractors without a
            ``fingerprint`` keep nothing.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: ``batch_size`` below 1, or an empty name. In ``setup``: fewer than 2 reference images.
        TypeError: ``features`` is no module.
    """

    main = "fid"

    def __init__(
        self,
        features: nn.Module | None = None,
        kid: bool = True,
        prdc: bool = True,
        swd: bool = False,
        reference: Images = None,
        name: str = "fid",
        batch_size: int = 50,
        cache: bool | str = True,
        **common: Any,
    ) -> None:
        super().__init__(name=name, **common)
        check_whole(1, batch_size=batch_size)
        self.features: nn.Module = InceptionFeatures() if features is None else features
        check_network(features=self.features)
        self.kid, self.prdc, self.swd, self.batch_size = kid, prdc, swd, batch_size
        self.reference, self.cache = GivenImages("FID", "reference", reference), ReferenceCache(cache)
        self._new: str | None = None
        self.metric: TwoSample = TwoSample(keep_reference=True)
        self._ready = False

    def produces(self) -> list[str]:
        wanted = {"kid": self.kid, "swd": self.swd} | dict.fromkeys(NAMES, self.prdc)
        return ["fid", *(name for name, is_wanted in wanted.items() if is_wanted)]

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().prepare(trainer, pl_module)
        count = self.reference.check(trainer, least=2)
        self._ready = False  # another run may have another reference set
        if self.reference.are_shots(trainer):
            self.warn_once(
                "the reference images are the shots themselves: values say how closely the shots are copied, not how "
                "well their domain is met. Give other images of it as the reference"
            )
        if self.prdc and count <= NEIGHBOURS:
            self._warn_of_prdc(f"there are {count} reference images")

    def inspect(self, trainer: pl.Trainer, samples: Samples) -> None:
        self.reference.check_size(trainer, (samples.images.shape[2], samples.images.shape[3]))

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self.metric.update(extract(self.features, images, self.batch_size), real=False, indices=seeds)

    def _add_reference(self, trainer: pl.Trainer) -> None:
        if self.reference.are_new(trainer, self._size):
            self.metric.forget_reference()
            every, device = self.reference.load(trainer, self._size), self.metric.device
            key = self.cache.key(every, self.features, device, "features")
            if (known := self.cache.read(key)) is not None:
                own = own_share(trainer, len(every))
                self.metric.update(known["features"][own], real=True, indices=own)
            else:
                self._new = key
                for images, numbers in share(trainer, every, device, self.batch_size):
                    self.metric.update(extract(self.features, images, self.batch_size), real=True, indices=numbers)
        self._ready = True

    def _warn_of_prdc(self, there: str) -> None:
        self.warn_once(
            f"{', '.join(NAMES[:-1])} and {NAMES[-1]} are left out: they need more than {NEIGHBOURS} images of both "
            f"kinds, and {there}. Give more, or set prdc: false",
            once="prdc",
        )

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        if not self._ready:
            self._add_reference(trainer)
        x, y = (self.metric.compute()[kind] for kind in ("generated", "reference"))
        if trainer.is_global_zero:
            self.cache.write(self._new, {"features": y})
        self._new = None
        details: dict[str, Any] = {"reference": len(y), "extractor": feature_name(self.features)}
        if self.reference.are_shots(trainer):
            details["reference_is_shots"] = True
        if len(x) < 2:
            self.warn_once("FID is NaN and all else left out: there is 1 sample, and 2 are needed. Draw more samples")
            return Report({"fid": math.nan}, details)
        if isinstance(self.features, InceptionFeatures) and (len(x) < INCEPTION_RANK or len(y) < FEW_REFERENCES):
            self.warn_once(
                f"FID of {len(x)} generated against {len(y)} reference images is strongly biased upwards (advised: "
                f"{INCEPTION_RANK} and {FEW_REFERENCES} at least). Compare it only with FIDs of the same numbers; "
                f"KID is unbiased."
            )
        values = {"fid": frechet_distance(x, y)}
        if self.kid:
            values["kid"], details["kid_std"] = kid(x, y)
            details["kid_subset_size"] = min(1000, len(x), len(y))
        if self.swd:
            values["swd"] = sliced_wasserstein(x, y)
        if self.prdc and min(len(x), len(y)) > NEIGHBOURS:
            values |= prdc(x, y, NEIGHBOURS)
            details["neighbours"] = NEIGHBOURS
        elif self.prdc:
            self._warn_of_prdc(f"there are {len(x)} samples and {len(y)} reference images")
        return Report(values, details)

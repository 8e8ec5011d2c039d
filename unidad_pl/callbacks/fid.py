"""FID, KID and PRDC of the generated images against reference images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from unidad_pl.callbacks.base import Report, feature_name
from unidad_pl.callbacks.given_images import Images
from unidad_pl.callbacks.outputs import Samples
from unidad_pl.callbacks.reference import ReferenceCallback
from unidad_pl.metrics.features import InceptionFeatures
from unidad_pl.metrics.frechet import Gaussian, frechet_distance, read_statistics
from unidad_pl.metrics.kernel import kid
from unidad_pl.metrics.prdc import NAMES, prdc
from unidad_pl.metrics.wasserstein import sliced_wasserstein

STATISTICS = ".npz"
NEIGHBOURS = 5
FEW_REFERENCES = 500


class FID(ReferenceCallback):
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
            ``trainer.datamodule.reference``. Or an ``.npz`` of FID statistics (``mu``, ``sigma``), as clean-fid,
            torch-fidelity and released models have them: then FID is all there is.
        made_with: what the statistics of an ``.npz`` were made with: the ``name`` of an extractor, such as
            ``inception-v3-compat-2048`` of the default one. The record says it, and a warning if it is another than
            that of ``features``.
        name: what the distance is logged as. With another name than ``fid`` the others are called ``<name>_kid`` and so
            on, so that several of these callbacks can be used together.
        batch_size: images per pass of the extractor.
        cache: whether what was found of reference images is kept for other runs, by their content and the extractor's;
            or a folder to keep it in. Default: ``$XDG_CACHE_HOME/unidad_pl/references``. Extractors without a
            ``fingerprint`` keep nothing.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: ``batch_size`` below 1, an empty name, or an ``.npz`` without ``made_with`` or the reverse. In
            ``setup``: fewer than 2 reference images, or an ``.npz`` without such statistics.
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
        made_with: str | None = None,
        **common: Any,
    ) -> None:
        features = InceptionFeatures() if features is None else features
        super().__init__(features, reference, batch_size, cache, name=name, **common)
        self.kid, self.prdc, self.swd, self.made_with = kid, prdc, swd, made_with
        place = str(reference) if isinstance(reference, (str, Path)) else ""
        self.statistics = place if place.lower().endswith(STATISTICS) else None
        self._known: Gaussian | None = None
        if (self.statistics is None) != (made_with is None):
            raise ValueError(
                f"made_with says what the statistics of an {STATISTICS} were made with, such as "
                f"{feature_name(features)!r}: give both or none, got reference={reference!r}, made_with={made_with!r}"
            )

    def produces(self) -> list[str]:
        wanted = {"kid": self.kid, "swd": self.swd} | dict.fromkeys(NAMES, self.prdc)
        return ["fid", *(name for name, is_wanted in wanted.items() if is_wanted and self.statistics is None)]

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.statistics is None:
            super().prepare(trainer, pl_module)
            if self.prdc and (count := self.reference.check(trainer)) <= NEIGHBOURS:
                self._warn_of_prdc(f"there are {count} reference images")
            return
        self.load_features(trainer, self.features)
        self._known = read_statistics(self.statistics)
        if self.kid or self.prdc or self.swd:
            self.warn_once("only fid is computed: all else needs the reference images, and there are statistics only")
        if self.made_with != feature_name(self.features):
            self.warn_once(
                f"the statistics were made with {self.made_with!r}, the samples' features are those of "
                f"{feature_name(self.features)!r}: values mean something only if these are the same network, "
                f"with the same way of resizing pictures"
            )

    def inspect(self, trainer: pl.Trainer, samples: Samples) -> None:
        if self.statistics is None:
            super().inspect(trainer, samples)

    def _warn_of_prdc(self, there: str) -> None:
        self.warn_once(
            f"{', '.join(NAMES[:-1])} and {NAMES[-1]} are left out: they need more than {NEIGHBOURS} images of both "
            f"kinds, and {there}. Give more, or set prdc: false",
            once="prdc",
        )

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        if self._known is not None:
            return self._against(self._known)
        x, y, details = self.both(trainer)
        if not self._are_enough(len(x), x.shape[1], len(y)):
            return Report({"fid": math.nan}, details)
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

    def _are_enough(self, samples: int, width: int, references: int | None) -> bool:
        least = min(width, FEW_REFERENCES)  # from ``width`` images on a covariance can have full rank
        few = samples < width or (references is not None and references < least)
        if samples < 2:
            self.warn_once("FID is NaN and all else left out: there is 1 sample, and 2 are needed. Draw more samples")
        elif few:
            self.warn_once(
                f"FID of {samples} generated against {references or 'unknown'} reference images is strongly biased "
                f"upwards (advised: {width} and {least} at least). Compare it only with FIDs of the "
                f"same numbers; KID is unbiased."
            )
        return samples >= 2

    def _against(self, known: Gaussian) -> Report:
        x = self.metric.compute()["generated"]
        if x.shape[1] != len(known.mean):
            raise ValueError(
                f"{self.statistics!r} is of {len(known.mean)} features and {feature_name(self.features)!r} has "
                f"{x.shape[1]}: give the statistics of that extractor, or features= with the one they were made with"
            )
        details = {
            "reference": None, "statistics": self.statistics, "made_with": self.made_with,
            "extractor": feature_name(self.features),
        }  # fmt: skip
        enough = self._are_enough(len(x), x.shape[1], None)
        return Report({"fid": Gaussian.of(x).distance(known) if enough else math.nan}, details)

"""How far each factor of the samples is from the target population: is the variety there that ought to be?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from unidad_pl.callbacks.base import EvaluationCallback, Report, feature_name
from unidad_pl.callbacks.given_images import GivenImages, Images, share
from unidad_pl.callbacks.outputs import Samples
from unidad_pl.metrics.features import check_network, evaluating
from unidad_pl.metrics.gather import NumberedRows
from unidad_pl.metrics.wasserstein import wasserstein


class FactorDistance(EvaluationCallback):
    """Logs ``<stage>/distance/<factor>``: how far a factor's distribution in the samples is from the reference images'.

        >>> trainer = pl.Trainer(callbacks=[FactorDistance(["glasses", "skin", "tilt"])])

    Both are read by the same network, so that its errors are in both. A category's distance is the share of samples
    that would have to change theirs, in [0, 1]; a number's is the 1-Wasserstein distance, its range being [-1, 1]. The
    record in ``metrics.jsonl`` has the same between two halves of the reference images as ``floor``.

    Args:
        factors: names the network knows.
        features: a module with ``read(images) -> {factor: [N, values] or [N]}``: probabilities of a category's values,
            or a number; default the network of the cartoon world.
        reference: images, as in :class:`~unidad_pl.callbacks.fid.FID`.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: no factor. In ``setup``: fewer than 4 reference images. In a sanity step, or the first evaluation
            where there is none: a factor that the network does not know, or numbers that are not finite.
        TypeError: ``features`` is no module, or has no ``read``.
    """

    def __init__(
        self, factors: Sequence[str], features: nn.Module | None = None, reference: Images = None, **common: Any
    ) -> None:
        super().__init__(**common)
        if isinstance(factors, str) or not factors:
            raise ValueError(f"FactorDistance needs the names of one or more factors, got {factors!r}")
        if features is None:
            from unidad_pl.cartoons.features import CartoonFeatures

            features = CartoonFeatures()
        check_network(features=features)
        if not callable(getattr(features, "read", None)):
            raise TypeError(f"features must have read(images) -> {{factor: values}}, and {type(features).__name__} "
                            f"has none")  # fmt: skip
        self.factors = list(factors)
        self.features: nn.Module = features
        self.metric: NumberedRows = NumberedRows(torch.float32)
        self.reference = GivenImages("FactorDistance", "reference", reference)
        self._widths: list[int] = []
        self._known: Tensor | None = None

    def produces(self) -> list[str]:
        return [f"distance/{factor}" for factor in self.factors]

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().prepare(trainer, pl_module)
        self.reference.check(trainer, least=4)
        self._known = None  # another run may have another reference set

    def forget(self) -> None:
        self._known = None

    def inspect(self, trainer: pl.Trainer, samples: Samples) -> None:
        self.reference.check_size(trainer, (samples.images.shape[2], samples.images.shape[3]))
        if not self._stage(trainer) and len(samples.images):  # in an evaluation they are read next
            self.begin(trainer.lightning_module)  # the network has to be where the samples are
            with torch.no_grad():
                self._read(samples.images)

    def _read(self, images: Tensor) -> Tensor:
        with evaluating(self.features):
            read: dict[str, Tensor] = self.features.read(images)  # type: ignore[operator]
        if unknown := [factor for factor in self.factors if factor not in read]:
            raise ValueError(f"FactorDistance: {feature_name(self.features)} reads no {unknown[0]!r}, only "
                             f"{', '.join(read)}")  # fmt: skip
        columns = [read[factor].reshape(len(images), -1).float() for factor in self.factors]
        self._widths = [column.shape[1] for column in columns]
        read_all = torch.cat(columns, 1)
        if not bool(read_all.isfinite().all()):
            raise ValueError(f"FactorDistance: {feature_name(self.features)} reads numbers that are not finite")
        return read_all

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self.metric.update(self._read(images), seeds)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        samples = self._rows()
        if self._known is None or self.reference.are_new(trainer, self._size):
            self.metric.reset()
            for images, numbers in share(trainer, self.reference.load(trainer, self._size), self.metric.device, 64):
                self.metric.update(self._read(images), numbers)
            self._known = self._rows()
        known = self._known
        halves = known[::2], known[1::2]
        values = dict(zip(self.produces(), self._distances(samples, known), strict=True))
        floor = dict(zip(self.factors, self._distances(*halves), strict=True))
        details: dict[str, Any] = {"extractor": feature_name(self.features), "reference": len(known), "floor": floor}
        if self.reference.are_shots(trainer):
            details["reference_is_shots"] = True
        return Report(values, details)

    def _rows(self) -> Tensor:
        if not self._widths:  # a rank without an image splits the columns of the others as they do
            self._read(torch.zeros(1, 3, *(self._size or (32, 32)), device=self.metric.device))
        return self.metric.compute().reshape(-1, sum(self._widths)).cpu()

    def _distances(self, x: Tensor, y: Tensor) -> list[float]:
        found = []
        for a, b in zip(x.split(self._widths, 1), y.split(self._widths, 1), strict=True):
            category = a.shape[1] > 1
            shares = (a.double().mean(0) - b.double().mean(0)).abs().sum() / 2
            found.append(float(shares if category else wasserstein(a, b)[0]))
        return found

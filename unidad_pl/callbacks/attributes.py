"""The share of generated images that show a wanted attribute: was the new domain reached?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from unidad_pl.callbacks.base import EvaluationCallback, Report, feature_name
from unidad_pl.metrics.features import check_network, evaluating
from unidad_pl.metrics.gather import NumberedRows


class AttributeShare(EvaluationCallback):
    """Logs ``<stage>/share/<factor>=<value>``: the share of samples for which a classifier sees the wanted value.

        >>> trainer = pl.Trainer(callbacks=[AttributeShare({"glasses": "dark", "species": "cat"})])

    Args:
        wanted: factor -> value, e.g. ``{"glasses": "dark"}``.
        features: a module with ``predict(images) -> {factor: [N] int64}`` and ``categories: {factor: [names]}``;
            default the network of the cartoon world.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: nothing wanted. In ``setup``: a factor or value the classifier does not know.
        TypeError: ``features`` is no module, or has no ``predict``.
    """

    def __init__(self, wanted: Mapping[str, str], features: nn.Module | None = None, **common: Any) -> None:
        super().__init__(**common)
        if not wanted:
            raise ValueError("AttributeShare needs a wanted value of at least one factor, e.g. {'glasses': 'dark'}")
        if features is None:
            from unidad_pl.cartoons.features import CartoonFeatures

            features = CartoonFeatures()
        check_network(features=features)
        if not callable(getattr(features, "predict", None)):
            raise TypeError(
                f"features must have predict(images) -> {{factor: [N] int64}}, and {type(features).__name__} has none"
            )
        self.wanted = dict(wanted)
        self.features: nn.Module = features
        self.metric: NumberedRows = NumberedRows(torch.uint8)
        self._codes: dict[str, int] = {}

    def produces(self) -> list[str]:
        return [f"share/{factor}={value}" for factor, value in self.wanted.items()]

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().prepare(trainer, pl_module)
        categories: dict[str, list[str]] = getattr(self.features, "categories", {})
        for factor, value in self.wanted.items():
            if factor not in categories:
                raise ValueError(
                    f"AttributeShare: {feature_name(self.features)} knows no factor {factor!r}, only "
                    f"{', '.join(categories) or 'none'}"
                )
            if value not in categories[factor]:
                raise ValueError(
                    f"AttributeShare: factor {factor!r} has no value {value!r}, only {', '.join(categories[factor])}"
                )
            self._codes[factor] = list(categories[factor]).index(value)

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        with evaluating(self.features):
            seen: dict[str, Tensor] = self.features.predict(images)  # type: ignore[operator]
        hits = torch.stack([seen[factor].to(images.device) == code for factor, code in self._codes.items()], 1)
        self.metric.update(hits, seeds)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        hits = self.metric.compute().reshape(-1, len(self._codes))
        shares = hits.cpu().double().mean(0).tolist()
        return Report(dict(zip(self.produces(), shares, strict=True)), {"extractor": feature_name(self.features)})

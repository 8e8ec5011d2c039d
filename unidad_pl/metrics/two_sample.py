"""Two sets of features, generated and reference: the common part of Frechet, KID and PRDC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unidad_pl.checks import check_arguments
from unidad_pl.metrics.gather import RowMetric, distinct_in_order


class TwoSample(RowMetric):
    """Collects features of generated and of reference images; ``compute`` gives both, gathered over ranks.

        >>> metric = TwoSample()
        >>> metric.update(torch.randn(10, 4), real=False)
        >>> metric.update(torch.randn(20, 4), real=True)
        >>> {kind: features.shape for kind, features in metric.compute().items()}
        {'generated': torch.Size([10, 4]), 'reference': torch.Size([20, 4])}

    Rows come back in the order of the samples' indices, so that whatever is computed from them does not depend on how
    the samples were spread over ranks and batches.

    Args:
        keep_reference: ``reset`` keeps the reference features, for a metric computed many times during one run.
        kwargs: for ``torchmetrics.Metric``.
    """

    least = 0  # rows of each kind that a value needs

    def __init__(self, keep_reference: bool = False, **kwargs: Any) -> None:
        check_arguments(TwoSample.__init__, {"keep_reference": keep_reference})
        super().__init__(**kwargs)
        self.keep_reference = keep_reference
        for kind in ("generated", "reference"):
            self.add_rows(kind, 2, torch.float32)
            self.add_rows(f"{kind}_index", 1, torch.long, numbers=f"{kind}_index")

    def update(self, features: Tensor, real: bool, indices: Tensor | Sequence[int] | None = None) -> None:
        """Add features [N, D] of reference (``real``) or generated images.

        Args:
            features: any float type; kept in float32.
            real: whether the images are of the reference set.
            indices: global numbers of the N images; a number seen before is the same image and counts once. Default:
                in the order they come, dealt to ranks in turn. Give them always or never.

        Raises:
            TypeError: ``features`` is no tensor, or ``real`` neither True nor False.
            ValueError: features that are not a matrix, of another width than before, or not finite.
        """
        if not isinstance(features, Tensor) or not isinstance(real, bool):
            raise TypeError(
                f"features must be a tensor [N, D] and real True or False, got {type(features).__name__}, {real!r}"
            )
        kind = "reference" if real else "generated"
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(f"{kind} features must be floats [N, D], got {features.dtype} {tuple(features.shape)}")
        widths = {len(row) for name in ("generated", "reference") for part in getattr(self, name) for row in part[:1]}
        if widths - {features.shape[1]}:
            raise ValueError(f"{kind} features have D={features.shape[1]}, earlier ones D={widths}: use one extractor")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{kind} features hold NaN or infinite values: the images or the extractor are broken")
        numbers = self.number(f"{kind}_index", len(features), indices)
        self.append(kind, features)
        self.append(f"{kind}_index", numbers)

    def forward(self, features: Tensor, real: bool, indices: Tensor | Sequence[int] | None = None) -> Any:
        """``update``, and the value of this batch against all of the other kind so far: NaN where these are too few."""
        self.update(features, real, indices)
        rows = self._ordered("generated" if real else "reference")
        batch = features.detach().float().to(self.device)
        x, y = (rows, batch) if real else (batch, rows)
        enough = min(len(x), len(y)) >= self.least
        self._forward_cache = self.value(x, y) if enough else self.undefined()
        return self._forward_cache

    def _ordered(self, kind: str) -> Tensor:
        return self.rows(kind)[distinct_in_order(self.rows(f"{kind}_index"))]

    def pair(self) -> tuple[Tensor, Tensor]:
        """(generated [N, D], reference [M, D]) in index order."""
        return self._ordered("generated"), self._ordered("reference")

    def value(self, generated: Tensor, reference: Tensor) -> Any:
        """What is to be computed of features [N, D] and [M, D]: a tensor, or a dict of tensors."""
        if not len(generated) and not len(reference):
            raise ValueError(f"{type(self).__name__} has no samples: call update before compute")
        return {"generated": generated, "reference": reference}

    def undefined(self) -> Any:
        """The value of too few rows: NaN."""
        return self.scalar(math.nan)

    def compute(self) -> Any:
        """The value of all samples of all ranks.

        Raises:
            ValueError: too few of a kind.
        """
        return self.value(*self.pair())

    def forget_reference(self) -> None:
        """Drop the reference features, which ``reset`` may keep."""
        for name in ("reference", "reference_index"):
            setattr(self, name, [])
        self._computed = None

    def reset(self) -> None:
        """Forget the generated features, and the reference ones unless ``keep_reference``."""
        kept = {name: list(getattr(self, name)) for name in ("reference", "reference_index")}
        super().reset()
        if self.keep_reference:
            for name, rows in kept.items():
                setattr(self, name, rows)


def check_pair(x: Tensor, y: Tensor, metric: str, least: int = 2) -> None:
    """Refuse two feature matrices that ``metric`` cannot compare.

    Raises:
        ValueError: wrong shapes, values that are not finite, or fewer than ``least`` rows in one of them.
    """
    if x.ndim != 2 or y.ndim != 2 or (len(x) and len(y) and x.shape[1] != y.shape[1]):
        raise ValueError(f"{metric} needs features [N, D] and [M, D], got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < least:
        raise ValueError(
            f"{metric} needs at least {least} generated and {least} reference images, got {len(x)} and {len(y)}"
        )
    for kind, features in (("generated", x), ("reference", y)):
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{metric}: {kind} features hold NaN or infinite values: images or extractor are broken")

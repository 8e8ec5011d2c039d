"""Two sets of features, generated and reference: the common part of Frechet, KID and PRDC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unidad_pl.metrics.gather import RowMetric, distinct_in_order, sample_indices


class TwoSample(RowMetric):
    """Collects features of generated and of reference images; ``compute`` returns both, gathered over ranks.

        >>> metric = TwoSample()
        >>> metric.update(torch.randn(10, 4), real=False)
        >>> metric.update(torch.randn(20, 4), real=True)
        >>> generated, reference = metric.compute()
        >>> generated.shape, reference.shape
        (torch.Size([10, 4]), torch.Size([20, 4]))

    Rows come back in the order of the samples' indices, so that whatever is computed from them does not depend on how
    the samples were spread over ranks and batches.

    Args:
        keep_reference: ``reset`` keeps the reference features, for a metric computed many times during one run.
        kwargs: for ``torchmetrics.Metric``.
    """

    is_differentiable = False

    def __init__(self, keep_reference: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keep_reference = keep_reference
        for kind in ("generated", "reference"):
            self.add_rows(kind, 2, torch.float32)
            self.add_rows(f"{kind}_index", 1, torch.long)

    def update(self, features: Tensor, real: bool, indices: Tensor | Sequence[int] | None = None) -> None:
        """Add features [N, D] of reference (``real``) or generated images.

        Args:
            features: any float type; kept in float32.
            real: whether the images are of the reference set.
            indices: global numbers of the N images; a number seen before is the same image and counts once.
                Default: in the order they come, dealt to ranks in turn.

        Raises:
            ValueError: features that are not a matrix, of another width than before, or not finite.
        """
        kind = "reference" if real else "generated"
        if features.ndim != 2:
            raise ValueError(f"{kind} features must be [N, D], got shape {tuple(features.shape)}")
        widths = {len(row) for name in ("generated", "reference") for part in getattr(self, name) for row in part[:1]}
        if widths - {features.shape[1]}:
            raise ValueError(f"{kind} features have D={features.shape[1]}, earlier ones D={widths}: use one extractor")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{kind} features hold NaN or infinite values: the images or the extractor are broken")
        numbers = sample_indices(len(features), indices, start=self.count(kind))
        self.append(kind, features)
        self.append(f"{kind}_index", numbers)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(generated [N, D], reference [M, D]) in index order."""
        x, y = (self.rows(kind)[distinct_in_order(self.rows(f"{kind}_index"))] for kind in ("generated", "reference"))
        return x, y

    def compute(self) -> Any:
        """(generated [N, D], reference [M, D])."""
        return self.pair()

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
        ValueError: wrong shapes, or fewer than ``least`` rows in one of them.
    """
    if x.ndim != 2 or y.ndim != 2 or (len(x) and len(y) and x.shape[1] != y.shape[1]):
        raise ValueError(f"{metric} needs features [N, D] and [M, D], got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < least:
        raise ValueError(
            f"{metric} needs at least {least} generated and {least} reference images, got {len(x)} and {len(y)}"
        )

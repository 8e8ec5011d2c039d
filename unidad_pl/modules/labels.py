"""Class labels of class-conditional models: drawn where the data has none, and a fixed one for every sample seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ClassLabels:
    """The classes a run uses of a class-conditional model.

    Args:
        num_classes: classes of the model; None: it is unconditional and has no labels.
        chosen: the classes to use; None: all of them.

    Raises:
        ValueError: ``chosen`` is empty, names a class the model has not, or is given for an unconditional model.
    """

    def __init__(self, num_classes: int | None, chosen: Sequence[int] | None = None) -> None:
        if chosen is not None and num_classes is None:
            raise ValueError(f"classes={list(chosen)} were given, but the model is unconditional: leave classes null")
        if chosen is not None and (not chosen or any(not 0 <= c < (num_classes or 0) for c in chosen)):
            raise ValueError(f"classes must be some of 0..{(num_classes or 0) - 1}, got {list(chosen)}")
        self.num_classes = num_classes
        self.classes = list(range(num_classes or 0)) if chosen is None else list(chosen)

    def check(self, labels: Tensor | None, count: int) -> None:
        """Refuse labels [B] that do not fit ``count`` images and the model, before an embedding fails on them.

        Raises:
            ValueError: labels for an unconditional model, another number of them, or one out of range.
        """
        if labels is None:
            return
        if self.num_classes is None:
            raise ValueError("the batch carries class labels, but the model is unconditional: set labels off")
        if labels.shape != (count,) or labels.is_floating_point():
            raise ValueError(f"{count} images need {count} integer labels, got {tuple(labels.shape)} {labels.dtype}")
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            raise ValueError(
                f"labels must be in 0..{self.num_classes - 1}, the model's classes; got {int(labels.min())} to "
                f"{int(labels.max())}"
            )

    def draw(self, count: int, device: torch.device) -> Tensor | None:
        """``count`` labels int64, uniformly over the classes, from torch's global random state, or None."""
        if self.num_classes is None:
            return None
        classes = torch.tensor(self.classes, device=device)
        return classes[torch.randint(len(classes), (count,), device=device)]

    def of_seeds(self, seeds: Tensor) -> Tensor | None:
        """The labels of sample ``seeds`` [B]: the classes in turn, seed 0 the first; None without classes."""
        if self.num_classes is None:
            return None
        return torch.tensor(self.classes, device=seeds.device)[seeds % len(self.classes)]

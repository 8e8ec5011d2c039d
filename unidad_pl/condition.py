"""What images are conditioned on: class labels, or prompts that a text encoder has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The condition of B images. Each part has B rows, or is None where the model has no use for it.

        >>> empty, prompt = Condition(tokens=torch.zeros(1, 2, 8)), Condition(tokens=torch.ones(3, 5, 8))
        >>> both = Condition.cat([empty.expand(3), prompt])  # as classifier-free guidance does
        >>> len(both), both.tokens.shape, both.mask.sum(1).tolist()
        (6, torch.Size([6, 5, 8]), [2, 2, 2, 5, 5, 5])

    Attributes:
        labels: [B] int64, class labels.
        tokens: [B, L, D] float, the embedded tokens of a prompt.
        mask: [B, L] bool, which of them belong to the prompt; None: all.
        pooled: [B, E] float, one embedding of the whole prompt.

    Raises:
        ValueError: no part at all, parts with other numbers of rows, or a mask that is not one of the tokens.
    """

    labels: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(part.shape) for name, part in self.parts.items()}
        if len({shape[:1] for shape in shapes.values()}) != 1:
            raise ValueError(f"the parts of a condition must have equally many rows, at least one part, got {shapes}")
        if "mask" in shapes and shapes["mask"] != shapes.get("tokens", ())[:2]:
            raise ValueError(f"the mask of a condition must be that of its tokens [B, L], got {shapes}")
        if self.tokens is not None and self.tokens.ndim != 3:
            raise ValueError(f"the tokens of a condition must be [B, L, D], got {shapes}")
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ValueError(f"the mask of a condition must be bool, got {self.mask.dtype}: give mask.bool()")

    @property
    def parts(self) -> dict[str, Tensor]:
        """Name -> what is there."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in found.items() if part is not None}

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(**{name: change(part) for name, part in self.parts.items()})

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        """Some of the rows."""
        return self._each(lambda part: part[rows])

    def to(self, device: torch.device | str) -> Condition:
        """The same on ``device``."""
        return self._each(lambda part: part.to(device))

    def expand(self, rows: int) -> Condition:
        """``rows`` times the only row; the same condition where it has so many already.

        Raises:
            ValueError: it has another number of rows.
        """
        if len(self) not in (1, rows):
            raise ValueError(f"{len(self)} conditions cannot become {rows}: give 1 or {rows}")
        return self._each(lambda part: part.expand(rows, *part.shape[1:]))

    @staticmethod
    def of(labels: Tensor | None) -> Condition | None:
        """The condition of class labels [B]; None where there are none."""
        return None if labels is None else Condition(labels)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """All rows one after the other; shorter prompts are filled up with zeros that their mask leaves out.

        Raises:
            ValueError: conditions of different kinds.
        """
        kinds = {tuple(name for name in one.parts if name != "mask") for one in conditions}
        if len(kinds) != 1:
            raise ValueError(f"conditions of different kinds cannot go together: {sorted(kinds)}")
        lengths = [one.tokens.shape[1] for one in conditions if one.tokens is not None]
        if len(set(lengths)) > 1 or len({one.mask is None for one in conditions}) > 1:
            conditions = [one._filled_up(max(lengths)) for one in conditions]
        names = conditions[0].parts
        return Condition(**{name: torch.cat([one.parts[name] for one in conditions]) for name in names})

    def _filled_up(self, length: int) -> Condition:
        assert self.tokens is not None
        mask = self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.bool) if self.mask is None else self.mask
        missing = length - self.tokens.shape[1]
        return Condition(self.labels, F.pad(self.tokens, (0, 0, 0, missing)), F.pad(mask, (0, missing)), self.pooled)

"""The noise that networks are trained at: a table of sigmas, and draws from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseTable:
    """Sigmas [N], ascending.

    >>> noise = NoiseTable(torch.tensor([0.5, 1.0, 2.0]))
    >>> noisy, sigma = noise.add(torch.zeros(4, 3, 8, 8), last=1)  # sigma [4] out of 0.5 and 1
    >>> noise.up_to(1.5)
    2
    """

    sigmas: Tensor

    def __len__(self) -> int:
        return len(self.sigmas)

    def up_to(self, sigma: float) -> int:
        """How many entries are at most ``sigma``."""
        return int((self.sigmas <= sigma).sum())

    def add(
        self, images: Tensor, first: int = 0, last: int | None = None, sigma: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``images + sigma * eps``, and sigma [B]: one entry in [first, last] and one eps per image, or those given."""
        if sigma is None:
            last = len(self) - 1 if last is None else last
            sigma = self._at(torch.randint(first, last + 1, (len(images),), device=images.device), images)
        return images + sigma.view(-1, 1, 1, 1) * torch.randn_like(images), sigma

    def draw_low(self, images: Tensor, share: float, entries: int) -> Tensor:
        """Sigmas [B], a ``share`` of them out of the first ``entries``, the others out of all."""
        low = torch.rand(len(images), device=images.device) < share
        index = torch.rand(len(images), device=images.device) * torch.where(low, entries, len(self))
        return self._at(index.long(), images)

    def _at(self, index: Tensor, images: Tensor) -> Tensor:
        return self.sigmas[index].to(images.dtype)

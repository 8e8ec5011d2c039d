"""The multi-head discriminator: one 1x1 convolution on each tap of the fake score network (paper, eq. 8-9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidad_pl.checks import check_choices, check_whole

HeadKind = Literal["global", "patch"]
Reduction = Literal["per_head", "mean_logit"]


class MultiHeadDiscriminator(nn.Module):
    """Logits from feature maps; positive means "real".

        >>> heads = MultiHeadDiscriminator({"in0": 8, "mid": 16}, reduction="per_head")
        >>> logits = heads({"in0": torch.zeros(4, 8, 32, 32), "mid": torch.zeros(4, 16, 4, 4)})
        >>> [tuple(one.shape) for one in logits]
        [(4,), (4,)]

    Args:
        tap_channels: name of each tap that gets a head -> its channels, see
            :attr:`unidad_pl.denoiser.Denoiser.tap_channels`.
        kind: ``global`` pools each logit map to one number per image, ``patch`` keeps one logit per location.
        reduction: ``per_head`` returns the heads' logits separately, so that the loss is a mean of per-head losses
            (eq. 8); ``mean_logit`` averages the logits over heads first, which makes all heads one linear classifier
            (released code). Patch maps are resized to the largest one before that average.

    Raises:
        ValueError: no tap, one without channels, or an unknown kind or reduction.
    """

    def __init__(
        self, tap_channels: Mapping[str, int], kind: HeadKind = "global", reduction: Reduction = "mean_logit"
    ) -> None:
        super().__init__()
        if not tap_channels:
            raise ValueError("a discriminator needs at least one tap")
        widths: dict[str, Any] = {f"tap_channels[{name}]": width for name, width in tap_channels.items()}
        check_whole(1, **widths)
        check_choices(kind=(kind, HeadKind), reduction=(reduction, Reduction))
        self.kind, self.reduction = kind, reduction
        self.heads = nn.ModuleDict({name: nn.Conv2d(c, 1, kernel_size=1) for name, c in tap_channels.items()})

    def forward(self, taps: Mapping[str, Tensor]) -> list[Tensor]:
        """Logits of ``taps`` (name -> [B, C, H, W]; taps without a head are ignored).

        Returns:
            One tensor per head (``per_head``) or a single one (``mean_logit``): [B] for ``global``, [B, H, W] for
            ``patch``.
        """
        maps = [self._logit_map(head, taps[name]) for name, head in self.heads.items()]
        if self.reduction == "per_head":
            return maps
        if self.kind == "patch":
            size = max((m.shape[-2:] for m in maps), key=lambda s: s[0] * s[1])
            maps = [F.interpolate(m[:, None], size, mode="bilinear", align_corners=False)[:, 0] for m in maps]
        return [torch.stack(maps).mean(0)]

    def _logit_map(self, head: nn.Module, tap: Tensor) -> Tensor:
        with torch.autocast(tap.device.type, enabled=False):  # logits in full precision: the losses take their log
            tap = tap.to(next(head.parameters()).dtype)
            if self.kind == "global":  # pooling first is the same number for less work: the head is linear
                return head(tap.mean(dim=(2, 3), keepdim=True)).flatten()
            return head(tap)[:, 0]


def accuracy(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Share of right verdicts over all heads, a scalar in [0, 1]; real images have positive logits."""
    right = [(r > 0).float().mean() + (f < 0).float().mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(right).detach().mean() / 2

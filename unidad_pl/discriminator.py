"""The multi-head discriminator: one 1x1 convolution on each tap of the fake score network (METHOD 5, paper eq. 8-9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidad_pl.losses import GANLoss

HeadKind = Literal["global", "patch"]
Reduction = Literal["per_head", "mean_logit"]


@dataclass
class Critic:
    """The multi-head GAN (METHOD 5).

    Attributes:
        student_weight: lambda_G, weight of the adversarial term in the student's loss; 0: none.
        critic_weight: lambda_D, weight of the critic's loss beside F's denoising loss; 0: no discriminator.
        taps: names of the encoder outputs that carry a head (``in0``, ``in1``, ..., ``mid``); null: all of them. What
            lies behind the deepest one is not evaluated.
        kind: ``global`` or ``patch`` logits.
        reduction: ``mean_logit`` (released code) or ``per_head`` (paper, eq. 8).
        loss: ``bce``, ``hinge``, ``lsgan`` or ``wgan``.
        noise: ``independent`` or ``shared`` sigma of the real and the generated image i of a critic batch.
        sigma_max: largest sigma at which the critic looks at images; null: the whole table. Lower values make the
            critic stronger, and with few shots more prone to memorising them.
        r1: weight of the R1 penalty on real images, inside the critic's loss; 0: none.
        gradient_penalty: weight of the WGAN-GP penalty on images between real and generated ones; 0: none.
        lr: learning rate of the heads; null: that of F.
    """

    student_weight: float = 0.015
    critic_weight: float = 0.05
    taps: list[str] | None = None
    kind: HeadKind = "global"
    reduction: Reduction = "mean_logit"
    loss: GANLoss = "bce"
    noise: Literal["independent", "shared"] = "independent"
    sigma_max: float | None = None
    r1: float = 0.0
    gradient_penalty: float = 0.0
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.noise not in ("independent", "shared"):
            raise ValueError(f"critic noise must be 'independent' or 'shared', got {self.noise!r}")
        for name in ("student_weight", "critic_weight", "r1", "gradient_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"critic {name} must be >= 0, got {getattr(self, name)}")
        if self.student_weight > 0 and self.critic_weight == 0:
            raise ValueError(
                f"critic student_weight={self.student_weight} needs a trained discriminator, but critic_weight is 0: "
                f"set both, or neither"
            )

    def head_taps(self, channels: Mapping[str, int]) -> dict[str, int]:
        """The taps that carry a head, out of all ``channels`` of a network.

        Raises:
            ValueError: a tap the network has not.
        """
        chosen = self.taps if self.taps is not None else list(channels)
        unknown = [name for name in chosen if name not in channels]
        if unknown:
            raise ValueError(f"critic taps {unknown} do not exist: this model has {', '.join(channels)}")
        return {name: channels[name] for name in chosen}


class MultiHeadDiscriminator(nn.Module):
    """Logits from feature maps; positive means "real".

    Args:
        tap_channels: name of each tap that gets a head -> its channels, see
            :attr:`unidad_pl.denoiser.Denoiser.tap_channels`.
        kind: ``global`` pools each logit map to one number per image, ``patch`` keeps one logit per location.
        reduction: ``per_head`` returns the heads' logits separately, so that the loss is a mean of per-head losses
            (eq. 8); ``mean_logit`` averages the logits over heads first, which makes all heads one linear classifier
            (released code). Patch maps are resized to the largest one before that average.

    Raises:
        ValueError: no tap, or an unknown kind or reduction.
    """

    def __init__(
        self, tap_channels: Mapping[str, int], kind: HeadKind = "global", reduction: Reduction = "mean_logit"
    ) -> None:
        super().__init__()
        if not tap_channels:
            raise ValueError("a discriminator needs at least one tap")
        if kind not in ("global", "patch"):
            raise ValueError(f"kind must be 'global' or 'patch', got {kind!r}")
        if reduction not in ("per_head", "mean_logit"):
            raise ValueError(f"reduction must be 'per_head' or 'mean_logit', got {reduction!r}")
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

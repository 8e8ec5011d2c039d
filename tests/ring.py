"""A world of two dimensions: eight modes on a ring, and ten shots of the same ring elsewhere.

An image is a point, [2, 1, 1]. The source's exact denoiser is known, so that its network is taught within seconds.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidad_pl import Denoiser
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Parameterization, Prediction

MODES, RADIUS, SPREAD, NEAR = 8, 0.45, 0.04, 0.12
SOURCE, TARGET = (-0.3, -0.15), (0.3, 0.15)
SIGMA_DATA = 0.5


def modes(centre: tuple[float, float]) -> Tensor:
    """[8, 2], the middles of the modes."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    return torch.tensor(centre) + RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def points(n: int, centre: tuple[float, float], seed: int) -> Tensor:
    """``n`` draws, [n, 2, 1, 1]."""
    g = torch.Generator().manual_seed(seed)
    own = modes(centre)[torch.randint(MODES, (n,), generator=g)]
    return (own + SPREAD * torch.randn(n, 2, generator=g)).view(n, 2, 1, 1)


def exact(x: Tensor, sigma: Tensor, centre: tuple[float, float]) -> Tensor:
    """``E[x0 | x]`` of the ring: each mode's own posterior mean, weighted by how likely the mode is."""
    middles, (n, *_) = modes(centre), x.shape
    s2 = sigma.view(n, 1, 1) ** 2
    apart = x.view(n, 1, 2) - middles
    weight = (-apart.square().sum(2) / (2 * (s2[:, :, 0] + SPREAD**2))).softmax(1)
    means = middles + apart * SPREAD**2 / (s2 + SPREAD**2)
    return (weight[:, :, None] * means).sum(1).view_as(x)


def found(x: Tensor, centre: tuple[float, float]) -> tuple[int, float]:
    """How many modes have at least a fiftieth of the samples ``x``, and the share of samples near any mode."""
    distance, mode = torch.cdist(x.flatten(1), modes(centre)).min(1)
    near = distance < NEAR
    counts = torch.bincount(mode[near], minlength=MODES)
    return int((counts >= len(x) / 50).sum()), float(near.float().mean())


class Points(Denoiser):
    """Four layers."""

    image_shape = (2, 1, 1)

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(8, width), nn.Linear(width, width)
        self.more, self.last = nn.Linear(width, width), nn.Linear(width, 2)

    @property
    def tap_channels(self) -> dict[str, int]:
        return {"in0": self.first.out_features, "mid": self.middle.out_features}

    def taps(
        self, x: Tensor, sigma: Tensor, cond: Condition | None = None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        c_in = Parameterization.of("edm", sigma, SIGMA_DATA).c_in
        level = (sigma.log() / 4)[:, None] * torch.tensor([1.0, 2.0, 4.0])
        first = F.silu(self.first(torch.cat([2 * (c_in * x).flatten(1), level.sin(), level.cos()], 1)))
        taps = {"in0": first[:, :, None, None]}
        if names is None or "mid" in names:
            taps["mid"] = F.silu(self.middle(first))[:, :, None, None]
        return taps

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        h = F.silu(self.more(self.taps(x, sigma)["mid"].flatten(1)))
        return Parameterization.of("edm", sigma, SIGMA_DATA).prediction(x, self.last(h)[:, :, None, None])


def source(steps: int = 1500, batch: int = 512) -> Points:
    """A network that knows the ring at ``SOURCE``."""
    torch.manual_seed(0)
    network = Points()
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        sigma = (1.4 * torch.randn(batch) - 1.5).exp().clamp(0.002, 80)
        x = points(batch, SOURCE, step)
        noisy = x + sigma.view(-1, 1, 1, 1) * torch.randn_like(x)
        weight = ((sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2).view(-1, 1, 1, 1)
        loss = (weight * (network.predict(noisy, sigma).x0 - exact(noisy, sigma, SOURCE)).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return network

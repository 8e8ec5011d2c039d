"""The multi-head discriminator against plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidad_pl.discriminator import HeadKind, MultiHeadDiscriminator, Reduction

CHANNELS = {"in0": 4, "in2": 3, "mid": 5}
SIDES = {"in0": 8, "in1": 8, "in2": 4, "mid": 2}


def taps() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, CHANNELS.get(name, 7), side, side, generator=random) for name, side in SIDES.items()}


def logit_maps(net: MultiHeadDiscriminator, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """[B, H, W] per head, one location at a time."""
    maps = {}
    for name, head in net.heads.items():
        assert isinstance(head, nn.Conv2d)
        assert head.bias is not None
        tap, weight, bias = features[name], head.weight[0, :, 0, 0], head.bias[0]
        maps[name] = torch.empty(len(tap), *tap.shape[2:])
        for b in range(len(tap)):
            for i in range(tap.shape[2]):
                for j in range(tap.shape[3]):
                    maps[name][b, i, j] = (weight * tap[b, :, i, j]).sum() + bias
    return maps


@pytest.mark.parametrize("kind", ["global", "patch"])
def test_per_head_against_loops(kind: HeadKind) -> None:
    net, features = MultiHeadDiscriminator(CHANNELS, kind, "per_head"), taps()
    logits = net(features)
    assert len(logits) == 3
    for ours, expected in zip(logits, logit_maps(net, features).values(), strict=True):
        torch.testing.assert_close(ours, expected.mean((1, 2)) if kind == "global" else expected)


def test_mean_logit_of_global_heads() -> None:
    net, features = MultiHeadDiscriminator(CHANNELS, "global", "mean_logit"), taps()
    (score,) = net(features)
    expected = sum(m.mean((1, 2)) for m in logit_maps(net, features).values()) / 3
    torch.testing.assert_close(score, expected)


def test_mean_logit_of_patch_heads_is_as_large_as_the_largest_map() -> None:
    net, features = MultiHeadDiscriminator(CHANNELS, "patch", "mean_logit"), taps()
    (score,) = net(features)
    maps = logit_maps(net, features).values()
    resized = [F.interpolate(m[:, None], (8, 8), mode="bilinear", align_corners=False)[:, 0] for m in maps]
    torch.testing.assert_close(score, sum(resized) / 3)


@pytest.mark.parametrize("kind", ["global", "patch"])
@pytest.mark.parametrize("reduction", ["per_head", "mean_logit"])
def test_gradient_reaches_every_head_and_every_tap(kind: HeadKind, reduction: Reduction) -> None:
    net = MultiHeadDiscriminator(CHANNELS, kind, reduction)
    features = {name: tap.requires_grad_() for name, tap in taps().items()}
    sum(logit.pow(2).mean() for logit in net(features)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert {name for name, tap in features.items() if tap.grad is not None} == set(CHANNELS)


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least one tap"):
        MultiHeadDiscriminator({})
    with pytest.raises(ValueError, match="'dense'"):
        MultiHeadDiscriminator(CHANNELS, "dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'sum'"):
        MultiHeadDiscriminator(CHANNELS, "patch", "sum")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="mid"):
        MultiHeadDiscriminator(CHANNELS)({name: tap for name, tap in taps().items() if name != "mid"})

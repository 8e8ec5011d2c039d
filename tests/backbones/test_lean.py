"""The blocks that compute with fewer operations give what diffusers' own give: outputs, gradients, and second ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from unidad_pl.backbones import NewUNet
from unidad_pl.backbones.lean import SelfAttention, lean

KINDS: dict[str, dict[str, Any]] = {
    "scale and shift, classes": dict(num_class_embeds=3),
    "resampling blocks": dict(downsample_type="resnet", upsample_type="resnet"),
    "divided outputs": dict(mid_block_scale_factor=1.5),
    "an added time embedding": dict(resnet_time_scale_shift="default"),
}


def network(**changes: Any) -> UNet2DModel:
    config = NewUNet(16, (16, 32), attention_levels=(1,), norm_groups=4, head_channels=8).config | changes
    torch.manual_seed(0)
    unet = UNet2DModel(**config).double()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_diffusers(kind: str) -> None:
    plain = network(**KINDS[kind])
    changed = copy.deepcopy(plain)
    lean(changed)
    assert list(changed.state_dict()) == list(plain.state_dict())
    answers = []
    for unet in (plain, copy.deepcopy(changed)):
        torch.manual_seed(1)
        x = torch.randn(3, unet.config["in_channels"], 8, 8, dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([0, 2, 1]) if "num_class_embeds" in KINDS[kind] else None
        with sdpa_kernel(SDPBackend.MATH):  # fused kernels have no second derivative
            out = unet(x, torch.tensor([3.0, 500.0, 900.0]), class_labels=labels).sample
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        slope.square().sum().backward()  # a second derivative, as penalties need
        answers.append([out, slope, *(p.grad for p in unet.parameters() if p.grad is not None)])
    assert len(answers[0]) == len(answers[1]) > 50
    for want, got in zip(*answers, strict=True):
        assert (got - want).abs().max() <= 1e-11 * max(1.0, float(want.abs().max()))


def test_every_block_that_can_be_is_lean_and_foreign_processors_stay() -> None:
    unet = network()
    mine = SelfAttention()
    attention = unet.mid_block.attentions[0]
    attention.set_processor(mine)
    lean(unet)
    blocks = [type(block).__name__ for block in unet.modules() if "ResnetBlock2D" in type(block).__name__]
    assert set(blocks) == {"LeanResnetBlock2D"}
    assert attention.processor is mine
    assert all(isinstance(one.processor, SelfAttention) for one in unet.modules() if isinstance(one, Attention))

"""Z-Image against diffusers' own class and pipeline."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers
import pytest
import torch
from torch import Tensor

from tests.backbones.conformance import Conformance
from unidad_pl.backbones.z_image import ZImageNetwork
from unidad_pl.condition import Condition

if not hasattr(diffusers, "ZImageTransformer2DModel"):
    pytest.skip("needs a newer diffusers", allow_module_level=True)


class TestZImage(Conformance):
    network = ZImageNetwork
    config: ClassVar = dict(
        in_channels=16, dim=16, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[2, 2, 4], axes_lens=[640, 64, 64],
    )  # fmt: skip
    latent_channels = 16
    vae: ClassVar = dict(scaling_factor=0.3611, shift_factor=0.1159)

    def theirs(self, net: Any, scaled: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert cond.tokens is not None
        latents = list(scaled.unsqueeze(2).unbind(dim=0))
        answer = net(latents, (1000 - t) / 1000, list(cond.tokens), return_dict=False)[0]
        return -torch.stack([one.float() for one in answer]).squeeze(2)

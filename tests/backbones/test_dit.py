"""DiT against diffusers' own class and pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.backbones.conformance import Conformance
from unidad_pl.backbones.dit import DiTNetwork
from unidad_pl.condition import Condition


class TestDiT(Conformance):
    network = DiTNetwork
    config: ClassVar = dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2,
    )  # fmt: skip
    scheduler: ClassVar = {"_class_name": "DDIMScheduler"}

    def theirs(self, net: Any, scaled: Tensor, t: Tensor, cond: Condition) -> Tensor:
        noise = net(scaled, timestep=t, class_labels=cond.labels).sample
        return noise.split(4, dim=1)[0]  # of eight channels: the rest is its variance

    def test_files_with_the_older_name_are_read(self, folder: Path, tmp_path: Path) -> None:
        copied = Path(shutil.copytree(folder, tmp_path / "older"))
        config = copied / "transformer" / "config.json"
        config.write_text(config.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
        network = self.load(folder)
        with torch.no_grad():
            given = self.given(network)
            assert torch.equal(self.load(copied)(*given), network(*given))

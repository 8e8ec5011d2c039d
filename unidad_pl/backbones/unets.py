"""What diffusers' UNets have in common behind the sigma contract: their blocks, and taps on them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import Any

from torch import Tensor

from unidad_pl.backbones.base import DiffusersNetwork
from unidad_pl.backbones.lean import lean
from unidad_pl.backbones.spec import UNetSpec
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Parameterization


class DiffusersUNet(DiffusersNetwork):
    """A diffusers UNet; its blocks compute as :mod:`~unidad_pl.backbones.lean` has it.

    Args:
        unet: the network; its parameters live under ``unet.`` in the state dict.
        spec: how to read it.
    """

    part, output_layer = "unet", "conv_out"
    unet: Any

    def __init__(self, unet: Any, spec: UNetSpec) -> None:
        super().__init__(unet, spec)
        lean(unet)

    blocks: frozenset[str | None] = frozenset()
    """The kinds of blocks, as configs name them, that taps and conditions are known of."""

    every_layer = False
    """Whether taps are the outputs of the first convolution and of every layer behind it, not of the down blocks."""

    @abstractmethod
    def _conditioned(self, emb: Tensor, cond: Condition | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The time embedding [B, E] with the condition's, and what blocks with cross-attention take besides."""

    def _folded(self, x: Tensor) -> Tensor:
        return x

    def check(self) -> None:
        config = self.unet.config
        unknown = {*config["down_block_types"], *config["up_block_types"], config["mid_block_type"]} - self.blocks
        if unknown:
            raise ValueError(
                f"blocks {sorted(map(str, unknown))} are not supported, only {sorted(filter(None, self.blocks))}"
            )
        halvings = 2 ** (len(config["block_out_channels"]) - 1)
        sides = config["sample_size"] if isinstance(config["sample_size"], (list, tuple)) else [config["sample_size"]]
        if any(side is not None and side % halvings for side in sides) or config["downsample_padding"] not in (0, 1):
            raise ValueError(
                f"sample_size {config['sample_size']} must be a multiple of {halvings}, downsample_padding 0 or 1, got "
                f"{config['downsample_padding']}"
            )
        super().check()

    def taps(
        self, x: Tensor, sigma: Tensor, cond: Condition | None = None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        c_in = Parameterization.of(self.spec.prediction, sigma, self.spec.sigma_data).c_in
        skip = h = self._folded(c_in * x).to(self.dtype)
        if self.unet.config["center_input_sample"]:
            skip = h = 2 * h - 1.0
        emb = self.unet.time_embedding(self.unet.time_proj(self.time(sigma)).to(h.dtype))
        emb, crossed = self._conditioned(emb, cond)
        h = self.unet.conv_in(h)
        outputs, depth = [h] if self.every_layer else [], self.depth_of(names)
        for block in self.unet.down_blocks:
            if len(outputs) < depth:
                crosses = getattr(block, "has_cross_attention", False)
                if hasattr(block, "skip_conv"):  # NCSN++ passes the image on beside its features
                    h, states, skip = block(hidden_states=h, temb=emb, skip_sample=skip)
                else:
                    h, states = block(hidden_states=h, temb=emb, **(crossed if crosses else {}))
                outputs += states if self.every_layer else [h]
        if len(outputs) < depth and self.unet.mid_block is not None:
            outputs.append(self.unet.mid_block(h, emb, **crossed))
        return dict(zip(self.tap_channels, outputs, strict=names is None))

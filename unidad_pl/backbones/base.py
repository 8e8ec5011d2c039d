"""What all diffusers UNets have in common behind the sigma contract: noise levels, output layer, memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from unidad_pl.backbones.lean import lean
from unidad_pl.backbones.lora import store_in_bfloat16
from unidad_pl.backbones.spec import UNetSpec
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Denoiser, Parameterization, Prediction
from unidad_pl.schedules import abar_from_sigma, sigma_from_abar


class _Float32Conv2d(nn.Conv2d):
    """The output convolution: float32 even under autocast, because sigma = 80 multiplies its rounding error."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu" if input.is_meta else input.device.type, enabled=False):
            return super().forward(input.to(torch.promote_types(self.weight.dtype, torch.float32)))

    @classmethod
    def of(cls, conv: nn.Conv2d) -> _Float32Conv2d:
        """The same layer, sharing ``conv``'s parameters."""
        same = cls(conv.in_channels, conv.out_channels, 1, padding=cast("tuple[int, int]", conv.padding), device="meta")
        same.kernel_size, same.weight, same.bias = conv.kernel_size, conv.weight, conv.bias
        return same


class DiffusersNetwork(Denoiser):
    """A diffusers UNet with its noise levels; the base of the backbones, which run it and add its condition.

    Args:
        unet: the network; its parameters live under ``unet.`` in the state dict. Its output layer computes in float32
            from now on, its blocks as :mod:`~unidad_pl.backbones.lean` has it.
        spec: how to read it.
    """

    def __init__(self, unet: Any, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.unet = unet
        lean(unet)
        self.unet.conv_out = _Float32Conv2d.of(unet.conv_out)
        self.register_buffer("abar", spec.abar(), persistent=False)
        self.abar: Tensor

    blocks: frozenset[str | None] = frozenset()
    """The kinds of blocks, as configs name them, that taps and conditions are known of."""

    every_layer = False
    """Whether taps are the outputs of the first convolution and of every layer behind it, not of the down blocks."""

    @abstractmethod
    def _output(self, x: Tensor, c_in: Tensor, time: Tensor, cond: Condition | None) -> Tensor:
        """The network's output [B, C, H, W] at ``c_in * x``."""

    @abstractmethod
    def _conditioned(self, emb: Tensor, cond: Condition | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The time embedding [B, E] with the condition's, and what blocks with cross-attention take besides."""

    def _folded(self, x: Tensor) -> Tensor:
        return x

    def check(self) -> None:
        """Refuse what diffusers builds and then cannot run, or what is no noise level.

        Raises:
            ValueError: blocks, sizes or betas that are not supported; names them.
        """
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
        if self.spec.prediction != "edm" and not (self.native_sigmas.isfinite() & (self.native_sigmas > 0)).all():
            raise ValueError("the scheduler's betas give noise levels that are 0 or infinite")

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        how = Parameterization.of(self.spec.prediction, sigma, self.spec.sigma_data)
        return how.prediction(x, self._output(x, how.c_in, self.time(sigma), cond))

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

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in, outside of autocast."""
        return self.unet.conv_in.weight.dtype

    def checkpoint_blocks(self) -> None:
        self.unet.enable_gradient_checkpointing()

    def to_bfloat16(self) -> None:
        store_in_bfloat16(self.unet)

    @property
    def native_sigmas(self) -> Tensor:
        if self.spec.prediction == "edm":
            return super().native_sigmas
        flow = self.spec.prediction == "flow"
        return self.spec.flow_levels() if flow else sigma_from_abar(self.abar.double()).float()

    def own_sigmas(self, num_steps: int) -> list[float] | None:
        return self.spec.own_sigmas(num_steps)

    def init_noise_sigma(self, sigma: float) -> float:
        return 1 + sigma if self.spec.prediction == "flow" else sigma  # a flow begins at noise of unit variance

    def input_scale(self, sigma: Tensor) -> Tensor:
        return Parameterization.of(self.spec.prediction, sigma, self.spec.sigma_data).c_in

    def time(self, sigma: Tensor) -> Tensor:
        """The network's time input [B] for ``sigma`` [B]."""
        if self.spec.prediction == "edm":
            return 250 * sigma.log() / 4
        if self.spec.prediction == "flow":
            return self.spec.train_timesteps * sigma / (1 + sigma)
        if self.spec.timestep == "nearest":
            return (abar_from_sigma(sigma)[:, None] - self.abar).abs().argmin(dim=1)
        table = sigma_from_abar(self.abar.double()).log()
        level = sigma.double().log().clamp(table[0], table[-1])
        right = torch.searchsorted(table, level).clamp(1, len(table) - 1)
        low, high = table[right - 1], table[right]
        return (right - 1 + (level - low) / (high - low)).to(sigma.dtype)

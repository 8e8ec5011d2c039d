"""What all diffusers UNets have in common behind the sigma contract: noise levels, output layer, memory."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from unidad_pl.backbones.lora import store_in_bfloat16
from unidad_pl.backbones.spec import UNetSpec
from unidad_pl.denoiser import Denoiser
from unidad_pl.schedules import abar_from_sigma, sigma_from_abar


class _Float32Conv2d(nn.Conv2d):
    """The output convolution: float32 even under autocast, because sigma = 80 multiplies its rounding error."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(torch.promote_types(self.weight.dtype, torch.float32)))

    @classmethod
    def of(cls, conv: nn.Conv2d) -> _Float32Conv2d:
        """The same layer, sharing ``conv``'s parameters."""
        same = cls(conv.in_channels, conv.out_channels, 1, padding=cast("tuple[int, int]", conv.padding), device="meta")
        same.kernel_size, same.weight, same.bias = conv.kernel_size, conv.weight, conv.bias
        return same


class DiffusersNetwork(Denoiser):
    """A diffusers UNet with its noise levels; the base of the backbones.

    Args:
        unet: the network; its parameters live under ``unet.`` in the state dict. Its output layer computes in float32
            from now on.
        spec: how to read it.
    """

    def __init__(self, unet: Any, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.unet = unet
        self.unet.conv_out = _Float32Conv2d.of(unet.conv_out)
        self.register_buffer("abar", spec.abar(), persistent=False)
        self.abar: Tensor

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
        return sigma_from_abar(self.abar.double()).float()

    def time(self, sigma: Tensor) -> Tensor:
        """The network's time input [B] for ``sigma`` [B]."""
        if self.spec.prediction == "edm":
            return 250 * sigma.log() / 4
        if self.spec.timestep == "nearest":
            return (abar_from_sigma(sigma)[:, None] - self.abar).abs().argmin(dim=1)
        table = sigma_from_abar(self.abar.double()).log()
        level = sigma.double().log().clamp(table[0], table[-1])
        right = torch.searchsorted(table, level).clamp(1, len(table) - 1)
        low, high = table[right - 1], table[right]
        return (right - 1 + (level - low) / (high - low)).to(sigma.dtype)

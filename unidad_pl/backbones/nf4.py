"""Linear layers in four bits (nf4, Dettmers et al. 2023), by bitsandbytes: a frozen base in a quarter of its size.

One tensor holds all of a layer's weights, codes and scales. So whatever shares, moves, hashes or leaves out parameters
treats it as any other.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64
"""Weights that have one scale."""


class Nf4Linear(nn.Linear):
    """A linear layer of frozen weights in four bits and a float32 scale for each 64 of them; it computes in bfloat16.

    >>> list(Nf4Linear.__mro__[1:3]) == [nn.Linear, nn.Module]
    True

    Attributes:
        weight: uint8 [9/16 of the weights]: the codes of two weights in each byte, then the scales.
        levels: float32 [16], what the codes stand for, in parts of the scale; None before the first pass.
    """

    levels: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        bitsandbytes: Any = import_module("bitsandbytes")
        codes, state = self._parts(torch.bfloat16)
        bias = None if self.bias is None else self.bias.bfloat16()
        # The product is bfloat16 whatever autocast would make of it, and so is the gradient.
        with torch.autocast(input.device.type, enabled=False):
            answer: Tensor = bitsandbytes.matmul_4bit(input.bfloat16(), codes.t(), quant_state=state)
        return answer if bias is None else answer + bias

    def plain(self) -> nn.Linear:
        """A linear layer with the same weights in float32."""
        from bitsandbytes.functional import dequantize_4bit

        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(dequantize_4bit(*self._parts(torch.float32)), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.float(), requires_grad=False)
        return layer

    def _parts(self, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """The codes, and how bitsandbytes is told to read them as ``dtype``."""
        from bitsandbytes.functional import QuantState, get_4bit_type

        shape = torch.Size((self.out_features, self.in_features))
        codes, scales = self.weight.split([shape.numel() // 2, self.weight.numel() - shape.numel() // 2])
        if self.levels is None or self.levels.device != codes.device:  # a copy to the device, not one in every pass
            self.levels = get_4bit_type("nf4", device=codes.device)
        state = QuantState(
            absmax=scales.view(torch.float32), shape=shape, code=self.levels, blocksize=BLOCK, quant_type="nf4",
            dtype=dtype,
        )  # fmt: skip
        return codes[:, None], state


def store_in_nf4(net: nn.Module) -> None:
    """Store the linear layers of ``net``'s blocks so, for good. What is outside of them is small, and feels it most.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed; names the extra.
        ValueError: there is no CUDA device, or no such layer.
    """
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError("lora.base_dtype nf4 needs bitsandbytes: pip install 'unidad_pl[nf4]'")
    from bitsandbytes.functional import quantize_4bit

    lists = [part for part in net.modules() if isinstance(part, nn.ModuleList)]
    blocks = dict.fromkeys(layer for part in lists for layer in part.modules())
    layers = [layer for layer in blocks if type(layer) is nn.Linear and not layer.weight.numel() % BLOCK]
    if not layers:
        raise ValueError(f"lora.base_dtype nf4: this network has no blocks with linear layers of {BLOCK} weights or a "
                         f"multiple: use bfloat16")  # fmt: skip
    for layer in layers:
        weight = layer.weight.detach()
        codes, state = quantize_4bit(weight.to(place_for(weight)), blocksize=BLOCK, quant_type="nf4")
        packed = torch.cat([codes.flatten(), state.absmax.view(torch.uint8)]).to(weight.device)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.__class__ = Nf4Linear


def weights_in(stored: Tensor) -> int:
    """How many weights a parameter is.

    >>> weights_in(torch.zeros(4, 64)), weights_in(torch.zeros(4 * 64 * 9 // 16, dtype=torch.uint8))
    (256, 256)
    """
    return stored.numel() * 16 // 9 if stored.dtype == torch.uint8 else stored.numel()


def place_for(weight: Tensor) -> torch.device:
    """Where ``weight`` is quantised; a tensor without storage stays where it is.

    Raises:
        ValueError: there is no CUDA device.
    """
    if weight.is_meta:
        return weight.device
    if not torch.cuda.is_available():
        raise ValueError("lora.base_dtype nf4 needs a CUDA device, and this machine has none: use bfloat16")
    return torch.device("cuda")

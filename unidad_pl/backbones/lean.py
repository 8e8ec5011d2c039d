"""diffusers' residual and attention blocks with fewer operations, and less kept for the backward pass: equal results.

* The time embedding's scale and shift go into the second norm's own, one pair for each image: two operations over the
  whole feature map less, and one map less is kept.
* Self-attention makes one contiguous copy of its tokens instead of one for each of query, key and value.
* Nothing is divided by one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def lean(unet: nn.Module) -> None:
    """Let the blocks of a diffusers UNet compute so from now on; their parameters and names stay."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0
    from diffusers.models.resnet import ResnetBlock2D

    for block in unet.modules():
        if type(block) is ResnetBlock2D and block.time_embedding_norm == "scale_shift" and block.time_emb_proj:
            block.__class__ = _lean_block()
        elif isinstance(block, Attention) and type(block.processor) is AttnProcessor2_0 and _is_plain(block):
            block.set_processor(SelfAttention())


def normed(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` of maps [B, C, H, W], with [B, C] scales and shifts, in one operation."""
    rows, channels = scale.shape
    weight, bias = norm.weight * (1 + scale), norm.bias * (1 + scale) + shift
    flat = x.reshape(1, rows * channels, *x.shape[2:])  # a group norm knows one weight for each channel
    return F.group_norm(flat, rows * norm.num_groups, weight.flatten(), bias.flatten(), norm.eps).view_as(x)


@cache
def _lean_block() -> type[nn.Module]:
    from diffusers.models.resnet import ResnetBlock2D

    class LeanResnetBlock2D(ResnetBlock2D):
        """A block whose time embedding scales and shifts."""

        def forward(self, input_tensor: Tensor, temb: Tensor, *_: Any, **__: Any) -> Tensor:
            h = self.nonlinearity(self.norm1(input_tensor))
            resize = self.upsample if self.upsample is not None else self.downsample
            if resize is not None:
                h, input_tensor = resize(h), resize(input_tensor)
            h = self.conv1(h)
            scale, shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb)).chunk(2, dim=1)
            h = self.dropout(self.nonlinearity(normed(self.norm2, h, scale, shift)))
            h = self.conv2(h) + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))
            return h if self.output_scale_factor == 1 else h / self.output_scale_factor

    return LeanResnetBlock2D


def _is_plain(attention: Any) -> bool:
    others = (attention.spatial_norm, attention.norm_q, attention.norm_k)
    return attention.group_norm is not None and others == (None,) * 3 and not attention.is_cross_attention


class SelfAttention:
    """Attention of maps [B, C, H, W] with themselves, as a processor of a diffusers ``Attention``."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        rows, channels, height, width = hidden_states.shape
        tokens = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2).contiguous()
        query, key, value = (
            layer(tokens).view(rows, height * width, attn.heads, -1).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(rows, height * width, -1)
        out = attn.to_out[1](attn.to_out[0](out)).transpose(1, 2).reshape(rows, channels, height, width)
        out = out + hidden_states if attn.residual_connection else out
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

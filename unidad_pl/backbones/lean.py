"""diffusers' residual and attention blocks with fewer operations, and less kept for the backward pass: equal results.

* Between a norm and the SiLU behind it nothing is kept: the backward pass computes the norm again, which is a hundredth
  of the time and a quarter of the memory of a step.
* The time embedding's scale and shift go into the second norm's own, one pair for each image: two operations over the
  whole feature map less, and one map less is kept.
* Self-attention makes one contiguous copy of its tokens instead of one for each of query, key and value.
* Nothing is divided by one, and a pass does not look through all modules for a dtype or at signatures.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lean(unet: nn.Module) -> None:
    """Let the blocks of a diffusers UNet compute so from now on; their parameters and names stay."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0
    from diffusers.models.resnet import ResnetBlock2D

    kind: Any = type(unet)
    unet.__class__ = _lean_model(kind)
    for block in unet.modules():
        if type(block) is ResnetBlock2D and block.time_emb_proj and isinstance(block.nonlinearity, nn.SiLU):
            block.__class__ = _lean_block()
        elif isinstance(block, Attention) and type(block.processor) is AttnProcessor2_0 and _is_plain(block):
            block.set_processor(SelfAttention())
            block.__class__ = _lean_attention()


def dtype_of(network: nn.Module) -> torch.dtype:
    """That of the first weights that are numbers; those in four bits are not."""
    return next(p.dtype for p in network.parameters() if p.is_floating_point())


@cache
def _lean_model(kind: Any) -> type[nn.Module]:
    """``kind`` under its own name, which pipelines save, with a dtype that is quick to find."""
    about = {"dtype": property(dtype_of), "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), about)


class NormedSiLU(torch.autograd.Function):
    """``silu(group_norm(x))`` of contiguous maps; of what the backward pass needs, ``x`` alone is a map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ctx.how = (*x.shape[:2], x[0, 0].numel(), groups, eps)
        normed, mean, rstd = torch.native_group_norm(x, weight, bias, *ctx.how)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        *sizes, groups, eps = ctx.how
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # a second derivative is wanted: by operations that have one
            inputs = [one for one, asked in zip((x, weight, bias), wanted, strict=True) if asked]
            y = F.silu(F.group_norm(x, groups, weight, bias, eps))
            found = iter(torch.autograd.grad(y, inputs, gradient, create_graph=True))
            return *(next(found) if asked else None for asked in wanted), None, None
        normed = torch.native_group_norm(x, weight, bias, *ctx.how)[0]
        gradient = torch.ops.aten.silu_backward(gradient.contiguous(), normed)
        found = torch.ops.aten.native_group_norm_backward(gradient, x, mean, rstd, weight, *sizes, groups, list(wanted))
        return *found, None, None


def normed_silu(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """``silu(norm(x))`` of maps [B, C, H, W], or ``silu(norm(x) * (1 + scale) + shift)`` with [B, C] each."""
    weight: Tensor = norm.weight
    bias: Tensor = norm.bias
    groups, shape = norm.num_groups, x.shape
    if scale is not None and shift is not None:  # a group norm knows one weight for each channel
        weight, bias = (weight * (1 + scale)).flatten(), (bias * (1 + scale) + shift).flatten()
        x, groups = x.reshape(1, -1, *shape[2:]), groups * len(x)
    place = x.device.type
    if place != "meta" and torch.is_autocast_enabled(place):  # as autocast treats a group norm
        x, weight, bias = x.float(), weight.float(), bias.float()
    x = x.contiguous()
    if torch.is_grad_enabled():
        out: Tensor = NormedSiLU.apply(x, weight, bias, groups, norm.eps)
    else:
        out = F.silu(torch.group_norm(x, groups, weight, bias, norm.eps), inplace=True)
    return out.view(shape)


@cache
def _lean_block() -> type[nn.Module]:
    from diffusers.models.resnet import ResnetBlock2D

    class LeanResnetBlock2D(ResnetBlock2D):
        """A block whose time embedding scales and shifts, or is added."""

        def forward(self, input_tensor: Tensor, temb: Tensor, *_: Any, **__: Any) -> Tensor:
            h = normed_silu(self.norm1, input_tensor)
            resize = self.upsample if self.upsample is not None else self.downsample
            if resize is not None:
                h, input_tensor = resize(h), resize(input_tensor)
            h = self.conv1(h)
            time = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                h = normed_silu(self.norm2, h, *time.chunk(2, dim=1))
            else:
                h = normed_silu(self.norm2, h + time[:, :, None, None])
            h = self.conv2(self.dropout(h)) + (
                input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
            )
            return h if self.output_scale_factor == 1 else h / self.output_scale_factor

    return LeanResnetBlock2D


@cache
def _lean_attention() -> type[nn.Module]:
    from diffusers.models.attention_processor import Attention

    class LeanAttention(Attention):
        """Attention that asks :class:`SelfAttention` without a look at its signature first."""

        def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Any:
            if type(self.processor) is SelfAttention:
                return self.processor(self, hidden_states)
            return super().forward(hidden_states, *others, **named)

    return LeanAttention


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

"""What all diffusers networks have in common behind the sigma contract: noise levels, output layer, memory."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from unidad_pl.backbones.lean import dtype_of
from unidad_pl.backbones.lora import store_in_bfloat16
from unidad_pl.backbones.spec import UNetSpec
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Denoiser, Parameterization, Prediction
from unidad_pl.schedules import abar_from_sigma, sigma_from_abar


class _Float32Layer(nn.Module):
    """An output layer: float32 even under autocast, because sigma = 80 multiplies its rounding error."""

    weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu" if input.is_meta else input.device.type, enabled=False):
            return super().forward(input.to(torch.promote_types(self.weight.dtype, torch.float32)))


class _Float32Conv2d(_Float32Layer, nn.Conv2d):
    pass


class _Float32Linear(_Float32Layer, nn.Linear):
    pass


class DiffusersNetwork(Denoiser):
    """A diffusers network with its noise levels; the base of the backbones, which run it and add its condition.

    Args:
        net: the network; it lives under the name :attr:`part`, in the state dict too. Its output layer computes in
            float32 from now on.
        spec: how to read it.
    """

    part: str
    """What diffusers' pipelines call the network: ``unet`` or ``transformer``."""

    output_layer: str
    """The name of its last layer."""

    def __init__(self, net: Any, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.add_module(self.part, net)
        last: Any = net.get_submodule(self.output_layer)
        last.__class__ = _Float32Linear if isinstance(last, nn.Linear) else _Float32Conv2d
        self.register_buffer("abar", spec.abar(), persistent=False)
        self.abar: Tensor

    @property
    def net(self) -> Any:
        """The diffusers network."""
        return getattr(self, self.part)

    @abstractmethod
    def _output(self, scaled: Tensor, time: Tensor, cond: Condition | None) -> Tensor:
        """The network's output [B, C, H, W] for its own input and time."""

    def check(self) -> None:
        """Refuse what diffusers builds and then cannot run, or what is no noise level.

        Raises:
            ValueError: blocks, sizes or betas that are not supported; names them.
        """
        if self.spec.prediction != "edm" and not (self.native_sigmas.isfinite() & (self.native_sigmas > 0)).all():
            raise ValueError("the scheduler's betas give noise levels that are 0 or infinite")

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        how = Parameterization.of(self.spec.prediction, sigma, self.spec.sigma_data)
        return how.prediction(x, self._output(how.c_in * x, self.time(sigma), cond))

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in, outside of autocast."""
        return dtype_of(self.net)

    def checkpoint_blocks(self) -> None:
        self.net.enable_gradient_checkpointing()

    def to_bfloat16(self) -> None:
        store_in_bfloat16(self.net, self.output_layer)

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


def checked_labels(cond: Condition | None, count: int) -> Condition:
    """``cond``, if it has the class labels of ``count`` images.

    Raises:
        ValueError: it has none, or another number of them.
    """
    if not isinstance(cond, Condition) or cond.labels is None or len(cond.labels) != count:
        raise ValueError(f"this network takes a condition with {count} class labels, got {cond!r:.80}")
    return cond


def blank_text(rows: int, tokens: int, width: int, pooled: int) -> Condition:
    """Zeros in the place of prompts: tokens [rows, ``tokens``, ``width``], and a pooled embedding if it has numbers."""
    return Condition(tokens=torch.zeros(rows, tokens, width), pooled=torch.zeros(rows, pooled) if pooled else None)


def checked_text(cond: Condition | None, count: int, width: int, pooled: int) -> Condition:
    """``cond``, if it has what a text-to-image network of ``count`` images takes.

    Args:
        cond: what was given.
        count: B.
        width: D of its tokens [B, L, D].
        pooled: E of its pooled embedding [B, E]; 0: it has none.

    Raises:
        ValueError: it has other parts or shapes; names them.
    """
    seen = {name: tuple(part.shape) for name, part in getattr(cond, "parts", {}).items()}
    wanted = {"tokens": (count, seen.get("tokens", (0, "L"))[1], width)} | (
        {"pooled": (count, pooled)} if pooled else {}
    )
    if not isinstance(cond, Condition) or {name: shape for name, shape in seen.items() if name != "mask"} != wanted:
        shapes = ", ".join(f"{name} {shape}" for name, shape in wanted.items())
        raise ValueError(f"{count} latents need a condition with {shapes}, got {seen or repr(cond)[:80]}")
    return cond

"""Low-rank adapters (LoRA, Hu et al. 2022) on a diffusers network, by peft: small trained weights over a frozen base.

The base is one set of tensors however many networks are made from it: a copy of a network with adapters has adapters
of its own and shares the base (:meth:`~unidad_pl.denoiser.Denoiser.__deepcopy__`). No adapter is ever switched on or
off, so that nothing depends on which network was used last.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from unidad_pl.backbones.nf4 import Nf4Linear, store_in_nf4
from unidad_pl.checks import check_at_least, check_given, check_options, check_positive, check_whole

ADAPTER = "default"
MOST_RANK = 4096
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass
class LoRA:
    """What is trained of a network in place of all its weights: ``W + (alpha / rank) B A`` in some layers.

        >>> attention_and_convolutions = LoRA(rank=8, target_modules=("to_q", "to_v", "conv1"))

    Attributes:
        rank: of the update of each layer.
        alpha: scale of the update, times ``rank``; null: the rank, a scale of 1.
        target_modules: ends of the names of the layers that get an adapter; null: a UNet's attention layers, those and
            the feed-forward layers of a transformer.
        base_dtype: how the frozen base is stored, ``float32``, ``bfloat16`` or ``nf4``: the linear layers of its blocks
            in four bits, for which bitsandbytes and a CUDA device are needed, the rest in bfloat16. Both of the last
            compute in bfloat16; adapters stay float32.

    Raises:
        ValueError: an option out of range; names it.
    """

    rank: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    base_dtype: Literal["float32", "bfloat16", "nf4"] = "float32"

    def __post_init__(self) -> None:
        check_given(rank=self.rank)
        check_whole(1, MOST_RANK, null=True, rank=self.rank)
        check_positive(alpha=self.alpha)
        check_at_least(0, 1e6, alpha=self.alpha)
        ends = ATTENTION if self.target_modules is None else self.target_modules
        if not isinstance(ends, (list, tuple)) or not ends or not all(isinstance(end, str) for end in ends):
            raise ValueError(f"target_modules must be a list of ends of names, got {ends!r}")
        check_options(self)


def add_adapters(net: Any, lora: LoRA, output_layer: str, usual: tuple[str, ...] = ATTENTION) -> None:
    """Put adapters into ``net``: the network computes what it did until they are trained.

    By default they go into its ``usual`` layers. The base stops being trained. ``A`` is drawn from torch's random
    state, ``B`` is zero.

    Raises:
        ModuleNotFoundError: peft is not installed; names the extra.
        ValueError: no layer has such a name; or four bits without CUDA.
    """
    if find_spec("peft") is None:
        raise ModuleNotFoundError("adapters need peft: pip install 'unidad_pl[sdp]'")
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(usual if lora.target_modules is None else lora.target_modules)
    names = [name for name, _ in net.named_modules()]
    absent = [end for end in targets if not any(name == end or name.endswith(f".{end}") for name in names)]
    if absent:
        raise ValueError(f"lora.target_modules: this network has no layer whose name ends in {', '.join(absent)}")
    _tables_as_weights(net)
    if lora.base_dtype != "float32":
        store_in_bfloat16(net, output_layer)
    if lora.base_dtype == "nf4":
        store_in_nf4(net)
    config: Any = LoraConfig(
        r=lora.rank, lora_alpha=lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
        target_modules=targets,
    )  # fmt: skip
    if hasattr(net, "add_adapter"):
        net.add_adapter(config, adapter_name=ADAPTER)
    else:  # a class that diffusers knows no adapters of
        inject_adapter_in_model(config, net, ADAPTER)
    for weight in net.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # peft makes them like the base


def _tables_as_weights(net: nn.Module) -> None:
    """Tables that files hold, such as 0.8 GiB of positions in Stable Diffusion 3.5, are a part of the base: buffers
    would be in every copy and in every checkpoint."""
    for layer in net.modules():
        for name, table in list(layer.named_buffers(recurse=False)):
            if name not in layer._non_persistent_buffers_set and table.is_floating_point():
                del layer._buffers[name]
                layer.register_parameter(name, nn.Parameter(table, requires_grad=False))


def store_in_bfloat16(net: nn.Module, output_layer: str) -> None:
    """Store all layers but the output layer in bfloat16."""
    for name, layer in net.named_modules():
        for own, weight in layer.named_parameters(recurse=False) if name != output_layer else ():
            setattr(layer, own, nn.Parameter(weight.detach().bfloat16(), weight.requires_grad))


def base_names(network: nn.Module) -> frozenset[str]:
    """Names of the parameters of ``network`` that are no adapter's."""
    return frozenset(name for name, _ in network.named_parameters() if ".lora_" not in name)


def merged(net: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of ``net`` with its adapters added to the weights they adapt: a plain diffusers network of ``dtype``.

    Each layer is added up in float32 (a small update would be lost in bfloat16's rounding of the sum), and on its own:
    of a large network there is never more than one layer in float32.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain, adapted = copy.deepcopy(net), cast(Any, BaseTunerLayer)
    for name, layer in list(plain.named_modules()):
        place, _, own = name.rpartition(".")
        if isinstance(layer, adapted):
            if isinstance(base := layer.get_base_layer(), Nf4Linear):
                layer.base_layer = base.plain()
            layer.float().merge()
            setattr(plain.get_submodule(place), own, layer.get_base_layer().to(dtype))
        elif isinstance(layer, Nf4Linear) and own != "base_layer":
            setattr(plain.get_submodule(place), own, layer.plain().to(dtype))
    del plain.peft_config
    plain._hf_peft_config_loaded = False  # type: ignore[assignment]  # diffusers' word for it
    return nn.Module.to(plain, dtype)  # diffusers' own `to` warns


def adapter_weights(net: Any, part: str) -> dict[str, Tensor]:
    """The adapters of ``net``, a pipeline's ``part``, under the names that its ``load_lora_weights`` knows, float32;
    ``alpha / rank`` is multiplied into them, so that a loader that knows no alpha computes the same."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    scale = net.peft_config[ADAPTER].lora_alpha / net.peft_config[ADAPTER].r
    state = get_peft_model_state_dict(net, adapter_name=ADAPTER)
    scaled = {name: value * scale if ".lora_B." in name else value for name, value in state.items()}
    named = convert_state_dict_to_diffusers(scaled) if part == "unet" else scaled
    return {name: value.detach().to(torch.float32).contiguous() for name, value in named.items()}

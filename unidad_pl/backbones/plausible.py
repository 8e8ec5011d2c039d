"""Whether a network's config can be that of the weights beside it, asked before anything of its size is made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from unidad_pl.checks import check_at_least
from unidad_pl.files import read_json

MOST_LAYERS = 1000
"""In one block of a network."""
MOST_PARAMETERS = 20_000
"""Tensors of one network; those of Stable Diffusion XL's UNet are 1680."""
MOST_PIXELS = 2**14
"""Along each axis of what a network works on."""
MOST_TIMESTEPS = 1_000_000
WEIGHTS = ("*.safetensors", "*.bin")


def check_plausible(kind: Any, folder: Path, *weights: Path) -> None:
    """Refuse a ``config.json`` that describes a larger network than the files of its weights can hold.

    The network is made without memory, and no further than to its first parameter too many.

    Args:
        kind: class of the network, of diffusers or transformers.
        folder: holds ``config.json``.
        weights: the files of the weights; those of ``folder`` where none are given.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: names the entry, or both sizes; or whatever the class finds wrong with its config.
    """
    config = read_json(folder / "config.json", "config of a network")
    for name, value in config.items():
        # Lists of so many entries are made before the first parameter is.
        most = MOST_LAYERS if "layers" in name else MOST_PIXELS if name == "sample_size" else math.inf
        for number in _numbers(value) if most < math.inf else ():
            check_at_least(0, most, **{f"{name} in {folder / 'config.json'}": number})
    files = list(weights) or [file for pattern in WEIGHTS for file in folder.glob(pattern)]
    if files:
        _build_within(kind, config, folder, sum(file.stat().st_size for file in files))


def _build_within(kind: Any, config: dict[str, Any], folder: Path, room: int) -> None:
    elements = parameters = 0

    def count(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal elements, parameters
        if parameter is not None and parameter.is_meta:  # others are another thread's
            elements, parameters = elements + parameter.numel(), parameters + 1
        if elements > room or parameters > MOST_PARAMETERS:  # an element takes a byte at least
            raise ValueError(
                f"{str(folder / 'config.json')!r} describes a network of more than {parameters - 1} tensors and "
                f"{elements} numbers, the weights beside it are {room} bytes: take both from the same model"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class.from_dict(config))
    finally:
        hook.remove()


def _numbers(value: Any) -> Iterator[Any]:
    """The numbers of an entry, which may be a list for the blocks, and lists in that."""
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value

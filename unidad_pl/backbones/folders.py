"""What the config of a network may say, and the network it describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from unidad_pl.checks import check_at_least, check_positive, check_whole
from unidad_pl.files import read_json, reading

CONFIG_FILE = "config.json"
MOST = 10**6
"""Above any width, number of classes or size of a vocabulary."""
FACTORS = ("mid_block_scale_factor", "resnet_out_scale_factor", "scaling_factor")
CHOICES = {
    "downsample_type": ("conv", "resnet"), "upsample_type": ("conv", "resnet"),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}  # fmt: skip
"""Names where diffusers takes any other for one of them."""
MOST_SIDE = 8192
MOST_NUMBERS = 10**11
"""Above the size of any network."""
MOST_BLOCKS = 500
"""Above any number of levels times layers of a level times transformers of a layer."""


def empty_network(kind: Any, folder: Path, *older: str) -> Any:
    """The diffusers network of class ``kind`` that ``config.json`` in ``folder`` describes, on the meta device.

    Args:
        kind: the class.
        folder: the network's.
        older: names that the class had before.

    Raises:
        FileNotFoundError: there is no config.
        BrokenFile: it describes another class, or nothing that can be built.
    """
    config = checked_config(kind, folder, *older)
    with reading(folder / CONFIG_FILE, f"config of a {kind.__name__}"), torch.device("meta"):
        network = kind.from_config(config)
        if (size := sum(part.numel() for part in (*network.parameters(), *network.buffers()))) > MOST_NUMBERS:
            raise ValueError(f"it describes {size:.3g} numbers, more than {MOST_NUMBERS:.0g}")
        return network


def checked_network(kind: Any, folder: Path, wrapped: Callable[[Any], Any], *older: str) -> Any:
    """The network of class ``kind`` that a folder's config describes, without weights, when it is seen to work.

    Args:
        kind: a network of diffusers.
        folder: the network's.
        wrapped: the network -> its denoiser, whose ``check`` is asked.
        older: names of ``kind`` in older configs.

    Raises:
        BrokenFile: as of :func:`empty_network`; or what ``wrapped`` or ``check`` refuses.
    """
    network = empty_network(kind, folder, *older)
    with reading(folder / CONFIG_FILE, f"config of a {kind.__name__}"), torch.device("cpu"):
        wrapped(network).check()
    return network


def checked_config(kind: Any, folder: Path, *older: str) -> dict[str, Any]:
    """What ``config.json`` in ``folder`` says, every value of the type and in the range of a ``kind``'s option.

    Arguments as of :func:`empty_network`.

    Raises:
        FileNotFoundError: there is no config.
        BrokenFile: names the first value that is wrong.
    """
    path = folder / CONFIG_FILE
    config = read_json(path, f"config of a {kind.__name__}")
    with reading(path, f"config of a {kind.__name__}"):
        if config.get("_class_name", kind.__name__) not in (kind.__name__, *older):
            raise ValueError(f"it describes a {config['_class_name']!r}")
        hints = get_type_hints(kind.__init__)
        for name, option in signature(kind.__init__).parameters.items():
            if name in config:
                check_value(name, config[name], hints.get(name, _hint_of(option.default)))
        check_positive(**{name: config.get(name) for name in FACTORS})
        check_at_least(0, 1, freq_shift=config.get("freq_shift"), dropout=config.get("dropout"))
        for name, known in CHOICES.items():
            if (chosen := config.get(name)) is not None and chosen not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)} or null, got {chosen!r}")
        for side in _numbers(config.get("sample_size")):
            check_whole(1, MOST_SIDE, null=True, sample_size=side)
        check_depth(config)
    return config


def check_depth(config: Mapping[str, Any]) -> None:
    """Refuse a network of so many blocks that building it would not end.

    Raises:
        ValueError: says how many.
    """
    names = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")
    lists = [value for name, value in config.items() if isinstance(value, list) and name != "layer_types"]
    levels = max(map(len, lists), default=1)  # that one has an entry for each layer
    deepest = [max([1, *_numbers(config.get(name))]) for name in names]
    if (blocks := math.prod([max(1, levels), *deepest])) > MOST_BLOCKS:
        raise ValueError(f"it describes {blocks:.3g} blocks ({levels} levels of {deepest}), more than {MOST_BLOCKS}")


def check_value(name: str, value: Any, hint: Any) -> None:
    """Refuse a ``value`` that the annotation ``hint`` does not allow, and numbers no network has; null is a bool's
    false.

        >>> check_value("patch_size", 2, int | tuple[int, ...])
        >>> check_value("axes", 2, tuple[int, ...])
        Traceback (most recent call last):
        ...
        ValueError: axes must be list, got '2' (int)

    Raises:
        ValueError: names it.
    """
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    lists = [one for one in hints if (get_origin(one) or one) in (list, tuple)]
    types = {list if one in lists else one for one in hints}
    if isinstance(value, (list, tuple)) and lists:
        inner = [item for one in lists for item in get_args(one) if item is not Ellipsis]
        for item in value:
            check_value(name, item, Union[tuple(inner)] if inner else Any)  # noqa: UP007 (of a computed tuple)
    elif Any not in types and not (value is None and types & {bool, type(None)}):
        known = float in types and type(value) is int
        if type(value) not in types and not known:
            wanted = " or ".join(sorted(t.__name__ for t in types if isinstance(t, type) and t is not type(None)))
            raise ValueError(f"{name} must be {wanted}, got {str(value)[:50]!r} ({type(value).__name__})")
        if type(value) in (int, float):
            signed = name.startswith(("latents_", "shift_"))
            check_at_least(-MOST if signed else 0, MOST, **{name: value})


def _hint_of(default: Any) -> Any:
    """What an option without an annotation takes: more of its default's kind; a size, where that is None."""
    if default is None:
        return int | None
    return list[type(default[0])] if isinstance(default, (list, tuple)) and default else type(default)  # type: ignore[misc]


def _numbers(value: Any) -> list[Any]:
    """All numbers in nested lists."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def in_diffusers(name: str) -> Any:
    """The class ``name`` of diffusers.

    Raises:
        ImportError: the installed one has none.
    """
    import diffusers

    try:
        return getattr(diffusers, name)
    except AttributeError as error:
        raise ImportError(
            f"the installed diffusers {diffusers.__version__} has no {name}: pip install --upgrade diffusers"
        ) from error

"""Files of tensors, read as data: code in them never runs."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

State = dict[str, Tensor]

WRAPPERS = ("ema", "model", "state_dict")
PREFIXES = ("module.", "unet.")
"""What DistributedDataParallel, and then Uni-DAD's released code (``pytorch_model.bin``), put before every name."""


def read_plain(file: str | Path | IO[bytes], shown: str, map_location: Any = "cpu") -> Any:
    """What ``torch.save`` wrote, if it is plain data.

    Args:
        file: a path, or an open file.
        shown: what errors call it.
        map_location: see ``torch.load``.

    Raises:
        ValueError: it carries code, or is no such file or only a part of one.
    """
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{shown!r} is no file of plain tensors: it may carry code, which is never run here. Save its state "
            f"dict alone, with torch.save or as .safetensors, where you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{shown!r} cannot be read as a file of tensors, it may be cut short: {error}") from error


def read_weights(path: str | Path) -> State:
    """The weights in a file (``torch.save`` or safetensors) of the released code's kind, on the CPU, dtypes kept.

    Weights wrapped under ``ema``, ``model`` or ``state_dict`` (looked for in that order) are taken out, with a warning
    in the log that says which. Prefixes that all names share (:data:`PREFIXES`) are taken off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or does not hold a mapping from names to tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file at {str(path)!r}: put it there, or give the path of yours")
    if Path(path).suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is not a safetensors file: {error}") from error
    content = read_plain(path, str(path))
    wrapped = [name for name in WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)]
    if wrapped:
        rest = sorted(str(name) for name in set(content) - {wrapped[0]})
        log.warning("weights taken from entry %r of %s; other entries unused: %s", wrapped[0], path, rest)
        content = content[wrapped[0]]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(v) for v in content.values()):
        raise ValueError(
            f"{str(path)!r} holds no weights: expected a mapping from names to tensors, by itself or under one of "
            f"{', '.join(WRAPPERS)}"
        )
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content

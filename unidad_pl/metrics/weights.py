"""Weights of metric networks: numbers alone are read, and what is wrong with a file is said in one sentence."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from unidad_pl.files import mistaken

ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def only_weights() -> Iterator[None]:
    """Within the block ``torch.load`` runs no code in a file, whoever calls it: torch-fidelity asks for it."""
    before = os.environ.get(ONLY_WEIGHTS)
    os.environ[ONLY_WEIGHTS] = "1"
    try:
        yield
    finally:
        del os.environ[ONLY_WEIGHTS]
        if before is not None:
            os.environ[ONLY_WEIGHTS] = before


def check_numbers(state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are no finite floats.

    Raises:
        ValueError: names the first.
    """
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values")


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line, without torch's advice to load a file unsafely."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it is no file of plain tensors, or it carries code, which is never run here"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def missing_weights(owner: str, file: str, size: str, url: str, path: str | None, error: BaseException) -> RuntimeError:
    """The error to raise when the weights of ``owner`` cannot be read from ``path`` or, if None, be downloaded."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    reason = mistaken(path or folder / file) or reason_of(error)
    if path is not None:
        found = f"weights_path={path!r} could not be loaded: {reason}."
    elif (folder / file).is_file():
        found = f"{str(folder / file)!r} could not be loaded, remove it: {reason}."
    else:
        found = f"Not found at {folder / file} and the download failed: {reason}."
    return RuntimeError(
        f"{owner} needs the weights {file} ({size}). {found} Download {url} and put it in {folder}/, "
        f"or pass weights_path=<the file>."
    )


def weight_versions(network: nn.Module) -> list[int]:
    """Which tensors ``network`` holds, and how often each was written to: another list means other weights.

    >>> layer = nn.Linear(1, 1)
    >>> before = weight_versions(layer)
    >>> nn.init.ones_(layer.weight) is layer.weight, weight_versions(layer) == before
    (True, False)
    """
    tensors = [*network.parameters(), *network.buffers()]
    return [number for one in tensors for number in (id(one), 0 if one.is_inference() else one._version)]

"""What was computed of reference images, kept on disk: the images of another run are often the same.

An entry is found by everything its value follows from: the pictures' own bytes, the extractor's code, settings and
weights, and the machinery that runs it. Nothing is looked up by a name or a time, so an entry cannot be out of date;
the folder may be deleted at any moment.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unidad_pl.files import expanded, reading, replacing

PACKAGES = ("unidad_pl", "torch", "torchvision", "torch-fidelity", "lpips", "transformers")
CHECKSUM = "sha256"


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/unidad_pl/references``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unidad_pl" / "references"


def digest_of(*values: object) -> str:
    """sha256 of tensors (type, shape and bytes), of modules (names and tensors of their state), of tuples of all of
    these, and of plain values.

    >>> digest_of(torch.zeros(2), "vgg") == digest_of(torch.zeros(2), "vgg") != digest_of(torch.zeros(2), "alex")
    True

    Raises:
        TypeError: anything else, which could print alike and be different.
    """
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, nn.Module):
            digest.update(digest_of(*sorted(value.state_dict().items())).encode())
        elif isinstance(value, (tuple, list)):
            digest.update(digest_of(*value).encode())
        elif isinstance(value, dict):
            digest.update(digest_of(*value.items()).encode())
        elif isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif value is None or isinstance(value, (str, bytes, int, float)):
            digest.update(f"{value!r};".encode())
        else:
            raise TypeError(f"a {type(value).__name__} has no digest: give tensors, modules, numbers or texts")
    return digest.hexdigest()


def identity(features: nn.Module) -> str | None:
    """What the values of an extractor follow from, besides the images; None if its class does not say.

    A class says it by a method ``fingerprint`` of its own: an inherited one knows nothing of what a subclass adds. The
    file that the class is written in counts too.
    """
    kind: Any = type(features)
    if "fingerprint" not in vars(kind):
        return None
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return digest_of(kind.__qualname__, Path(file).read_bytes() if file else b"", kind.fingerprint(features))


def _machinery(device: torch.device) -> list[str]:
    """Versions and settings with which values are the same up to the last digits."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    backends = torch.backends
    return [*found, device.type, str(backends.cudnn.allow_tf32), str(backends.cuda.matmul.allow_tf32)]


class ReferenceCache:
    """Tensors computed of images, in one safetensors file for each set of images and extractor.

        >>> from unidad_pl.metrics import LPIPSFeatures
        >>> cache, phi = ReferenceCache("cache"), LPIPSFeatures("squeeze", pnet_rand=True)
        >>> key = cache.key(torch.zeros(2, 3, 32, 32), phi, torch.device("cpu"), "features")
        >>> cache.write(key, {"features": torch.ones(2, 4)})
        >>> cache.read(key)["features"].shape
        torch.Size([2, 4])

    Args:
        folder: where; True: :func:`default_folder`; False: nothing is read or written.
    """

    def __init__(self, folder: bool | str | Path = True) -> None:
        self.folder = None if folder is False else default_folder() if folder is True else expanded(folder)

    def key(self, images: Tensor, features: nn.Module, device: torch.device, *more: object) -> str | None:
        """The name of an entry, or None where there can be none: switched off, or an extractor without identity.

        Args:
            images: all of them, as the extractor gets them.
            features: the extractor.
            device: where it runs.
            more: what else the value follows from.
        """
        own = None if self.folder is None else identity(features)
        return None if own is None else digest_of(images, own, *_machinery(device), *more)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"

    def read(self, key: str | None) -> dict[str, Tensor] | None:
        """The entry, or None: there is none, or, with a warning, none that is whole."""
        if key is None or not self._path(key).is_file():
            return None
        from safetensors import safe_open

        path = self._path(key)
        try:
            with reading(path, "cached reference", "it is computed anew"), safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in sorted(file.keys())}
                if (file.metadata() or {}).get(CHECKSUM) != digest_of(*found.items()):
                    raise ValueError("its content has changed")
        except (OSError, ValueError) as error:
            warnings.warn(str(error), stacklevel=2)
            return None
        return found

    def write(self, key: str | None, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry. Where it cannot be written there is a warning and no entry."""
        if key is None:
            return
        from safetensors.torch import save_file

        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        try:
            with replacing(self._path(key)) as part:
                save_file(whole, part, {CHECKSUM: digest_of(*whole.items())})
        except Exception as error:  # noqa: BLE001 (safetensors has its own; whatever it is, the value is there)
            warnings.warn(f"the reference cannot be kept in {str(self.folder)!r} ({error})", stacklevel=2)

"""Files of tensors, read as data: code in them never runs."""

from __future__ import annotations

import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from unidad_pl.files import BrokenFile, expanded, mistaken, read_json, reading

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Stems = tuple[str, str]
"""Names of a network's weights without suffix: of safetensors, and of ``.bin`` files."""
NETWORK: Stems = ("diffusion_pytorch_model", "diffusion_pytorch_model")
"""Those of diffusers."""

WRAPPERS = ("ema", "model", "state_dict")
PREFIXES = ("module.", "unet.")
"""What DistributedDataParallel, and then Uni-DAD's released code (``pytorch_model.bin``), put before every name."""
VARIANTS = ("fp16", "bf16", "fp32")
"""Precisions that a folder's files of weights may be named after, in the order they are looked for."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called the layers of an attention before 0.12, as in google/ddpm-celebahq-256."""


def read_plain(file: str | Path | IO[bytes], shown: str, map_location: Any = "cpu") -> Any:
    """What ``torch.save`` wrote, if it is plain data.

    Args:
        file: a path, or an open file.
        shown: what errors call it.
        map_location: see ``torch.load``.

    Raises:
        FileNotFoundError: there is none.
        BrokenFile: it carries code, or is no such file or only a part of one.
    """
    with reading(shown, "file of tensors, it may be cut short"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that a file looks like a TorchScript archive
        _refuse_changed(file)
        try:
            return torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:
            if isinstance(error, (FileNotFoundError, PermissionError)) or mistaken(shown):
                raise
            raise _in_other_words(error, shown) from error


def _refuse_changed(file: str | Path | IO[bytes]) -> None:
    """``torch.save`` compresses nothing: what unpacks to more than the file holds could be endless. CRCs of files."""
    if not zipfile.is_zipfile(file):
        if not isinstance(file, (str, Path)):
            file.seek(0)
        return
    with zipfile.ZipFile(file) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"its entry {packed[0]!r} is compressed")
        if isinstance(file, (str, Path)) and (changed := archive.testzip()):
            raise ValueError(f"its entry {changed!r} is not what was written")
    if not isinstance(file, (str, Path)):
        file.seek(0)


def _in_other_words(error: Exception, shown: str) -> Exception:
    """``error`` of ``torch.load`` without its advice, which is to load the file unsafely."""
    text = str(error)
    way_out = "Save its state dict alone, with torch.save or as .safetensors, where you trust it."
    if "TorchScript" in text:
        return BrokenFile(f"{shown!r} is a TorchScript archive, which carries code that is never run here. {way_out}")
    if "legacy .tar format" in text:
        return BrokenFile(f"{shown!r} was written by a torch before 0.1.10, in a way that cannot be read. {way_out}")
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL ([\w.]+)", text)
        return BrokenFile(
            f"{shown!r} is no file of plain tensors: it may carry code, which is never run here"
            f"{f' (it names {named[1]})' if named else ''}. {way_out}"
        )
    return error


def read_weights(path: str | Path) -> State:
    """The weights in a file (``torch.save`` or safetensors) of the released code's kind, on the CPU, dtypes kept.

    Weights wrapped under ``ema``, ``model`` or ``state_dict`` (looked for in that order) are taken out, with a warning
    in the log that says which. Prefixes that all names share (:data:`PREFIXES`) are taken off.

    Raises:
        FileNotFoundError: no such file.
        BrokenFile: the file cannot be read, or does not hold a mapping from names to tensors.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {str(path)!r}: put it there, or give the path of yours")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with reading(path, "safetensors file"):
            return load_file(path)
    content = read_plain(path, str(path))
    wrapped = [name for name in WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)]
    if wrapped:
        rest = sorted(str(name)[:50] for name in set(content) - {wrapped[0]})
        log.warning("weights taken from entry %r of %s; other entries unused: %s", wrapped[0], path, rest)
        content = content[wrapped[0]]
    if not isinstance(content, dict) or not content or not all(_is_weight(*item) for item in content.items()):
        raise BrokenFile(
            f"{str(path)!r} holds no weights: expected a mapping from names to tensors, by itself or under one of "
            f"{', '.join(WRAPPERS)}"
        )
    size = os.path.getsize(path)
    if spread := [name for name, value in content.items() if value.numel() * value.element_size() > size]:
        raise BrokenFile(f"{str(path)!r} holds less than the numbers of its tensor {spread[0]!r}: write it again")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def _is_weight(name: object, value: object) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"
    return plain and isinstance(name, str)


def choose_weights(names: Collection[str], stems: Stems) -> str | None:
    """The file of weights among the ``names`` in a model's folder, or the index of its parts (``*.index.json``).

    Files without a precision in their name come first, then :data:`VARIANTS`; safetensors before others.

        >>> choose_weights({"model.fp16.safetensors", "model.safetensors", "model.bin"}, ("model", "model"))
        'model.safetensors'
    """
    for variant in ("", *VARIANTS):
        dot = f".{variant}" if variant else ""
        for stem, suffix in zip(stems, ("safetensors", "bin"), strict=True):
            for name in (f"{stem}{dot}.{suffix}", f"{stem}.{suffix}.index{dot}.json"):
                if name in names:
                    return name
    return None


def find_weights(folder: Path, stems: Stems = NETWORK) -> Path:
    """The file of weights in a model's folder, see :func:`choose_weights`.

    Args:
        folder: the model's folder.
        stems: names without suffix: of safetensors, and of ``.bin`` files.

    Raises:
        FileNotFoundError: there is none; names what is there.
    """
    there = {file.name for file in folder.glob("*") if file.is_file()}
    if (name := choose_weights(there, stems)) is not None:
        return folder / name
    others = sorted(name for name in there if name.endswith((".safetensors", ".bin", ".msgpack", ".h5")))
    raise FileNotFoundError(
        f"weights are missing in {str(folder)!r}: there is no {stems[0]}.safetensors (or .{VARIANTS[0]}.safetensors, "
        f"or {stems[1]}.bin){f', only {others}' if others else ''}: the download is incomplete, get all of the model"
    )


def parts_of(weights: Path, there: Collection[str] | None = None) -> list[str]:
    """The names of the files of weights: ``weights`` itself, or the parts that it is the index of.

    Args:
        weights: as of :func:`find_weights`.
        there: names of the files beside it; None: those of its folder.

    Raises:
        FileNotFoundError: a part is missing.
        BrokenFile: an index that cannot be read, or names files elsewhere.
    """
    if weights.suffix != ".json":
        return [weights.name]
    with reading(weights, "index of weights"):
        parts = sorted(set(read_json(weights, "index of weights")["weight_map"].values()))
        if outside := [part for part in parts if Path(part).name != part]:
            raise ValueError(f"it names the file {outside[0]!r}, which is not in this folder")
    for part in parts:
        if not ((weights.parent / part).is_file() if there is None else part in there):
            raise FileNotFoundError(
                f"no weights file at {str(weights.parent / part)!r}, of which {weights.name} tells: the download is "
                f"incomplete, get all of the model"
            )
    return parts


def read_folder(folder: Path, stems: Stems = NETWORK) -> State:
    """The weights in a model's folder, see :func:`find_weights`; of several parts, all of them.

    Those of a lower precision are read as float32, with a warning in the log.

    Raises:
        FileNotFoundError: they are missing, or a part of them.
        BrokenFile: a file that cannot be read, or an index that names files elsewhere.
    """
    found = find_weights(folder, stems)
    if low := [variant for variant in VARIANTS if f".{variant}." in found.name]:
        log.warning("%s has its weights in %s only: read as float32", folder, low[0])
    state: State = {}
    for part in parts_of(found):
        state |= read_weights(folder / part)
    return state


def in_new_names(state: State, wanted: Mapping[str, Any]) -> State:
    """``state`` with diffusers' old names of attention layers replaced where the network has the new ones."""

    def new(name: str) -> str:
        *path, layer, kind = name.rsplit(".", 2)
        renamed = ".".join([*path, OLD_ATTENTION.get(layer, layer), kind])
        return renamed if renamed in wanted else name

    return {new(name) if name.count(".") > 1 else name: value for name, value in state.items()}


def check_finite(state: Mapping[str, Tensor], shown: str) -> None:
    """Refuse weights that are not floats, or not all finite.

    Raises:
        BrokenFile: names the first tensor.
    """
    for name, value in state.items():
        if not value.is_floating_point():
            raise BrokenFile(f"{shown}: {name} holds {value.dtype} instead of floats: write the weights again")
        if not bool(torch.isfinite(value).all()):
            raise BrokenFile(
                f"{shown}: {name} holds NaN or infinite values, the model it was saved from had diverged: take an "
                f"earlier one"
            )


def fill(network: nn.Module, state: State, shown: str) -> None:
    """Put ``state`` into a ``network`` that lies on the meta device: it takes its place on the current default device.

    Nothing of its size is allocated before every name and shape is seen to fit.

    Raises:
        BrokenFile: names or shapes that do not fit, names them; or values that are not finite.
    """
    wanted = network.state_dict()
    state = in_new_names(state, wanted)
    problems = {
        "Missing": sorted(set(wanted) - set(state)), "Unexpected": sorted(set(state) - set(wanted)),
        "Misshapen": [
            f"{name} {list(state[name].shape)} instead of {list(value.shape)}"
            for name, value in wanted.items() if name in state and state[name].shape != value.shape
        ],
    }  # fmt: skip
    wrong = [f"{kind} keys, {len(names)}: {', '.join(names[:4])}" for kind, names in problems.items() if names]
    if wrong:
        raise BrokenFile(f"weights in {shown} do not fit its config. {'; '.join(wrong)}")
    numbers = {name: value for name, value in state.items() if wanted[name].is_floating_point()}
    check_finite(numbers, f"weights in {shown}")
    network.to_empty(device=torch.get_default_device()).load_state_dict(state)

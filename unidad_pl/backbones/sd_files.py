"""The parts of a Stable Diffusion model in its folder: which there must be, of which classes, and reading them."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unidad_pl.backbones.folders import CONFIG_FILE, MOST, MOST_SIDE, check_depth
from unidad_pl.backbones.hub import find_folder
from unidad_pl.backbones.spec import SCHEDULER_FILE, SUPPORTED
from unidad_pl.backbones.weights import NETWORK, Stems, check_finite, read_folder
from unidad_pl.checks import check_at_least, check_whole
from unidad_pl.files import BrokenFile, mistaken, read_json, reading

INDEX_FILE = "model_index.json"
RECORD_FILE = "unidad.json"
"""The record of a text-to-image export, beside a pipeline of diffusers' own kind."""
FEW_STEP = ["pipeline", "FewStepPipeline"]
"""The class that the index of an export gives, of pixels or of classes: the file in its folder, and its name there."""
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
LIBRARIES = ("diffusers", "transformers")
TEXT: Stems = ("model", "pytorch_model")
"""Names of the weights of transformers, without suffix."""
CODEC = ("vae", "text_encoder", "text_encoder_2")
"""Parts with weights beside the UNet."""
PARTS = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
CLASSES = {
    "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "scheduler": SUPPORTED,
    "text_encoder": ("CLIPTextModel",), "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"), "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}  # fmt: skip
"""What an index may name; the classes are taken from here, never by a name in a file."""


def find_pipeline(path: str, weights: Collection[str] = (), local_files_only: bool = False) -> Path:
    """The folder of the pipeline ``path``, or of the model of that id, see
    :func:`~unidad_pl.backbones.hub.find_folder`.

    Args:
        path: a folder or id.
        weights: the parts that weights are needed of; of the text encoders, those that there are.
        local_files_only: nothing is downloaded.

    Raises:
        FileNotFoundError: there is none, and what to download; or a part of it is missing, and which.
        OSError: a download that is not possible, and why.
        ValueError: another kind of pipeline, names its class; or no index that can be read.
    """

    def needed(folder: Path) -> dict[str, Stems]:
        check_pipeline(folder, path)
        present = {"unet", "vae", *text_parts(folder)}
        return {name: TEXT if name.startswith("text_") else NETWORK for name in weights if name in present}

    folder = find_folder(path, ("", *CLASSES), needed, local_files_only)
    check_pipeline(folder, path)
    return folder


def check_pipeline(folder: Path, path: str) -> None:
    """Refuse a folder that is no whole pipeline's, but for its weights and text parts.

    Raises:
        FileNotFoundError: a part is missing, and which.
        ValueError: another kind of pipeline.
    """
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(
            f"source model {path!r} has no {INDEX_FILE}: give the folder of a Stable Diffusion 1.x, 2.x or XL "
            f"pipeline as diffusers saves it"
        )
    read_index(folder)
    for part in PARTS:
        if not (folder / part).is_file():
            raise FileNotFoundError(f"source model {path!r} has no {part}: the download is incomplete")


def read_index(folder: Path) -> dict[str, Any]:
    """What ``model_index.json`` says: the pipeline's class, and (library, class) of each part or (None, None).

    Raises:
        ValueError: another kind of pipeline, or a part of another class than :data:`CLASSES`; names it.
    """
    path = folder / INDEX_FILE
    index = read_json(path, "pipeline's index")
    if "_class_name" not in index:
        raise BrokenFile(f"{str(path)!r} is no pipeline's index, it has no _class_name: download the model again")
    if index["_class_name"] not in PIPELINES:
        raise BrokenFile(f"{str(path)!r} is of a {index['_class_name']!s:.60}; supported are {', '.join(PIPELINES)}")
    for name, known in CLASSES.items():
        kind = index.get(name, [None, None])
        if kind != [None, None] and kind not in [[library, one] for library in LIBRARIES for one in known]:
            raise BrokenFile(f"{str(path)!r} gives the part {name} as {str(kind)[:80]}: it must be a {known[0]}")
    return index


def index_if_any(folder: Path) -> dict[str, Any]:
    """What the ``model_index.json`` in ``folder`` says, of any pipeline; empty where there is none."""
    path = folder / INDEX_FILE
    return read_json(path, "pipeline's index") if path.is_file() else {}


def size_of_export(folder: Path) -> int | None:
    """Image side in pixels that the student in an export's ``folder`` was trained at; None: it is no export's, or the
    network's own config says so."""
    record = folder / RECORD_FILE
    index = read_json(record, "record of an export") if record.is_file() else index_if_any(folder)
    size = index.get("resolution") if record.is_file() or index.get("_class_name") == FEW_STEP else None
    check_whole(1, MOST_SIDE, null=True, resolution=size)
    return size


def text_parts(folder: Path) -> list[str]:
    """The names of the pipeline's text encoders and tokenizers.

    A tokenizer without vocabulary is refused: transformers makes one of it that knows no word, and every prompt would
    be the same.

    Raises:
        FileNotFoundError: one that the index names is not there; names the first.
    """
    index = read_index(folder)
    names = [name for name in CLASSES if name.startswith(("text_", "token")) and index.get(name, [None])[0]]
    for name in names:
        file = CONFIG_FILE if name.startswith("text_") else ""
        if not (folder / name / file).exists():
            raise FileNotFoundError(f"source model {str(folder)!r} has no {name}/{file}: the download is incomplete")
        present = {file.name for file in (folder / name).glob("*")}
        if name.startswith("tokenizer") and present.isdisjoint({"vocab.json", "tokenizer.json"}):
            raise FileNotFoundError(
                f"source model {str(folder)!r} has neither {name}/vocab.json nor {name}/tokenizer.json: the download "
                f"is incomplete"
            )
    return names


def read_text_encoder(folder: Path, name: str) -> nn.Module:
    """The text encoder of transformers' class ``name`` in ``folder``, float32, all of its weights finite.

    Raises:
        FileNotFoundError: its config or its weights are missing.
        BrokenFile: they cannot be read, or do not fit each other.
    """
    import transformers

    kind: Any = getattr(transformers, name)
    entries = read_json(folder / CONFIG_FILE, "text encoder's config")
    with reading(folder / CONFIG_FILE, "text encoder's config"):
        check_depth(entries)
        numbers = {name: value for name, value in entries.items() if isinstance(value, (int, float))}
        check_at_least(-MOST, MOST, **{name: value for name, value in numbers.items() if not isinstance(value, bool)})
        config = kind.config_class.from_dict(entries)
        with torch.device("meta"):
            described = sum(weight.numel() for weight in kind(config).parameters())
    state = read_folder(folder, TEXT)
    state = {name: value for name, value in state.items() if not name.endswith("position_ids")}  # of older versions
    check_finite(state, f"weights in {folder}")
    with reading(folder, "text encoder"):
        if described > (held := sum(value.numel() for value in state.values())):
            raise ValueError(f"its config describes {described} numbers, its weights hold {held}")
        encoder, report = kind.from_pretrained(
            None, config=config, state_dict=state, torch_dtype=torch.float32, output_loading_info=True
        )
        if wrong := {problem: keys for problem, keys in report.items() if keys and problem != "unexpected_keys"}:
            raise ValueError(f"weights and config do not fit: {wrong}")
    if extra := sorted(report["unexpected_keys"]):
        seen = f"{len(extra)} weights in {folder} are none of a {name} and are not used: {', '.join(extra[:3])}"
        warnings.warn(seen, stacklevel=2)
    return encoder


def read_tokenizer(folder: Path, name: str = "CLIPTokenizer", chats: bool = False) -> Any:
    """The tokenizer of transformers' class ``name`` in ``folder``.

    Args:
        folder: the tokenizer's.
        name: of its class.
        chats: whether its pipeline writes prompts into its chat template.

    Raises:
        BrokenFile: a file of it that is none, no whole number of tokens that can be read, or no chat template.
    """
    import transformers

    for file in sorted(folder.iterdir()):
        if mistake := mistaken(file):
            raise BrokenFile(mistake)
        if file.suffix == ".json":
            read_json(file, "tokenizer's file")
    with reading(folder, "tokenizer"):
        tokenizer = getattr(transformers, name).from_pretrained(str(folder), local_files_only=True)
        check_at_least(3, model_max_length=tokenizer.model_max_length)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("it knows no word")
        tokenizer("a word", padding="max_length", max_length=8, truncation=True)
        if chats:
            _check_chat(tokenizer)
    return tokenizer


def _check_chat(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise ValueError("it has no chat template, neither as chat_template.jinja nor in tokenizer_config.json")
    said = [{"role": "user", "content": "a word"}]
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    if "a word" not in tokenizer.apply_chat_template(said, **options):
        raise ValueError("its chat template leaves out what is said")


def read_scheduler(folder: Path) -> Any:
    """The diffusers scheduler in ``folder``, of a class in :data:`SUPPORTED`.

    Raises:
        BrokenFile: no such scheduler.
    """
    import diffusers

    path = folder / SCHEDULER_FILE
    config = read_json(path, "scheduler config")
    with reading(path, "scheduler config"):
        if config.get("_class_name") not in SUPPORTED:
            raise ValueError(f"scheduler {config.get('_class_name')!r} is not supported")
        return getattr(diffusers, config["_class_name"]).from_config(config)

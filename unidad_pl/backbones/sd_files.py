"""Where the files of a Stable Diffusion model lie: a folder, or Hugging Face's cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INDEX_FILE = "model_index.json"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PARTS = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")


def find_pipeline(path: str) -> Path:
    """The folder of the pipeline ``path``: itself, or where Hugging Face's cache keeps the model of that id.

    Raises:
        FileNotFoundError: there is none, and what to download; or a part of it is missing, and which.
        ValueError: another kind of pipeline, names its class; or no index that can be read.
    """
    folder = Path(path).expanduser() if Path(path).expanduser().exists() else _cached(path)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(
            f"source model {path!r} has no {INDEX_FILE}: give the folder of a Stable Diffusion 1.x, 2.x or XL "
            f"pipeline as diffusers saves it"
        )
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(index)!r} is no pipeline's index: {error!r}. Download the model again") from error
    if name not in PIPELINES:
        raise ValueError(f"{path!r} is a {name}; supported are {', '.join(PIPELINES)}")
    for part in PARTS:
        if not (folder / part).is_file():
            raise FileNotFoundError(f"source model {path!r} has no {part}: the download is incomplete")
    return folder


def check_text_parts(folder: Path) -> None:
    """Refuse a pipeline whose index names text encoders or tokenizers that are not there, or without vocabulary:
    transformers makes one of those that knows no word, and every prompt would be the same.

    Raises:
        FileNotFoundError: names the first.
    """
    for name, kind in json.loads((folder / INDEX_FILE).read_text()).items():
        if name.startswith(("text_encoder", "tokenizer")) and kind[0] is not None and not (folder / name).is_dir():
            raise FileNotFoundError(f"source model {str(folder)!r} has no {name}/: the download is incomplete")
        present = {file.name for file in (folder / name).glob("*")}
        if name.startswith("tokenizer") and present.isdisjoint({"vocab.json", "tokenizer.json"}):
            raise FileNotFoundError(
                f"source model {str(folder)!r} has neither {name}/vocab.json nor {name}/tokenizer.json: the download "
                f"is incomplete"
            )


@contextmanager
def weights_of(folder: Path) -> Iterator[None]:
    """Around the reading of weights in ``folder``: says what to do where diffusers only says which file it wants.

    Raises:
        FileNotFoundError: a file of weights is missing.
    """
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"weights are missing in {str(folder)!r} ({reason}): the download is incomplete, "
            f"or has only another variant such as *.fp16.safetensors; download all of the model"
        ) from error


def _cached(path: str) -> Path:
    """Where Hugging Face's cache keeps the model ``path``; nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"source model {path!r} is neither a folder nor in Hugging Face's cache (--model.source.init_args.path): "
            f"put the model's diffusers folder there, as 'hf download OWNER/NAME --local-dir {path}' does, or give an "
            f"OWNER/NAME that 'hf download OWNER/NAME' has put into the cache"
        ) from error

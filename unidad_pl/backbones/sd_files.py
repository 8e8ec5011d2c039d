"""Where the files of a Stable Diffusion model lie: a folder, or Hugging Face's cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unidad_pl.files import BrokenFile, read_json, reading

INDEX_FILE = "model_index.json"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
"""Where the parts of such a pipeline may come from: diffusers would import any other name."""
PART_NAMES = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
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
    with reading(index, "pipeline's index", "download the model again"):
        content = read_json(index, "pipeline's index", "download the model again")
        name = content["_class_name"]
    if name not in PIPELINES:
        raise BrokenFile(f"{str(index)!r} is of a {str(name)[:60]}; supported are {', '.join(PIPELINES)}")
    for part, kind in content.items():
        wanted = isinstance(kind, list) or part.startswith(PART_NAMES)
        if wanted and (not isinstance(kind, list) or len(kind) != 2 or kind[0] not in LIBRARIES):
            raise BrokenFile(
                f"{str(index)!r} wants {part} from {kind!r}, known are {LIBRARIES}: download the model again"
            )
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
    for name, kind in read_json(folder / INDEX_FILE, "pipeline's index").items():
        if name.startswith(("text_encoder", "tokenizer")) and kind != [None, None] and not (folder / name).is_dir():
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
        BrokenFile: what is there cannot be read.
    """
    try:
        with reading(folder, "part of a model", "download it again"):
            yield
    except (BrokenFile, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, PermissionError) or (isinstance(error, BrokenFile) and "no file named" not in reason):
            raise
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

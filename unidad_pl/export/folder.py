"""What an export's folder holds: its own files, which the next export may replace, and a record that is checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open

from unidad_pl.backbones.folders import MOST_SIDE
from unidad_pl.backbones.sd_files import FEW_STEP, RECORD_FILE
from unidad_pl.backbones.spec import MOST_TIMESTEPS
from unidad_pl.checks import check_at_least, check_choices, check_positive
from unidad_pl.files import read_json, reading
from unidad_pl.runs.student import Weights

INDEX = "model_index.json"
"""diffusers' index of a pipeline; in that of a pipeline of our own the entries of the record are among its own."""
MOST_STEPS = 1000
WAY_OUT = "export the run again, or copy the folder again"
LIMITS = {
    "sample_size": (1, MOST_SIDE), "resolution": (1, MOST_SIDE), "train_timesteps": (2, MOST_TIMESTEPS),
    "num_train_timesteps": (2, MOST_TIMESTEPS), "original_inference_steps": (1, MOST_TIMESTEPS),
    "patch_size": (1, MOST_SIDE),
}  # fmt: skip
"""Sizes that no weights vouch for: entry of a config -> least and most."""
CONFIGS = ("config.json", "denoiser.json", "scheduler_config.json", INDEX, RECORD_FILE)


def is_text_export(folder: Path) -> bool:
    """Whether ``folder`` holds a text-to-image export."""
    return (folder / RECORD_FILE).is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """What an export says of its student, every entry checked, and all its other JSON files readable.

    Raises:
        FileNotFoundError: there is no such folder, or it has no record.
        BrokenFile: a file that is not what an export writes; names it.
        ValueError: the folder is another kind of pipeline.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no export at {str(folder)!r}")
    path = folder / (RECORD_FILE if is_text_export(folder) else INDEX)
    if not path.is_file():
        run = "; it is a run's: give one of its checkpoints, such as checkpoints/last.ckpt in it"
        raise ValueError(
            f"{str(folder)!r} is neither a checkpoint nor a directory that 'unidad export' wrote: no {INDEX}"
            f"{run if (folder / 'checkpoints').is_dir() else ''}"
        )
    content = read_json(path, "record of an export", WAY_OUT, finite=True)
    if path.name == INDEX and content.get("_class_name") != FEW_STEP:
        raise ValueError(
            f"{str(path)!r} is of a {str(content.get('_class_name'))[:60]}: it is neither a checkpoint nor "
            f"a directory that 'unidad export' wrote"
        )
    record = {name.removeprefix("_"): value for name, value in content.items()}
    with reading(path, "record of an export", WAY_OUT):
        _check_record(record)
    for file in sorted((*folder.glob("*.json"), *folder.glob("*/*.json"))):
        content = read_json(file, "part of an export", WAY_OUT, finite=True)
        if file.name in CONFIGS:  # a vocabulary may have any of these words in it
            _check_limits(content, file)
    for file in sorted(folder.glob("*/*.safetensors")):
        with reading(file, "file of weights", WAY_OUT), safe_open(file, "pt"):
            pass
    return record


def _check_record(record: dict[str, Any]) -> None:
    sigmas, classes, iteration = record["sigmas"], record.get("classes"), record["iteration"]
    if not isinstance(sigmas, list) or not 1 <= len(sigmas) <= MOST_STEPS or None in sigmas:
        raise ValueError(f"sigmas must be a list of 1 to {MOST_STEPS} numbers")
    for sigma in (*sigmas, record["sigma_min"] or 0):
        check_positive(**{"sigmas and sigma_min": sigma})
    check_at_least(0, max(sigmas), sigma_min=record["sigma_min"])
    check_choices(weights=(record["weights"], Weights))
    for number in (iteration, *(classes or [])):
        if type(number) is not int or number < 0:
            raise ValueError(f"iteration and classes must be whole numbers, got {number!r}")
    if not isinstance(record.get("token"), (str, type(None))):
        raise ValueError(f"token must be a word, got {record['token']!r}")


def _check_limits(content: dict[str, Any], path: Path) -> None:
    with reading(path, "part of an export", WAY_OUT):
        for name, (least, most) in LIMITS.items():
            value = content.get(name)
            for number in value if isinstance(value, list) else [value]:
                check_at_least(least, most, **{name: number})
                if number is not None and number != int(number):
                    raise ValueError(f"{name} must be a whole number, got {number}")


def note_files(folder: Path) -> None:
    """Write into the record which files are the export's own: only they are replaced by the next one."""
    path = folder / (RECORD_FILE if is_text_export(folder) else INDEX)
    name = "files" if path.name == RECORD_FILE else "_files"
    content = json.loads(path.read_text()) | {name: sorted(_entries(folder))}
    path.write_text(json.dumps(content, indent=2) + "\n")


def refuse_foreign(folder: Path) -> None:
    """Refuse to replace what is no export, and an export's folder that something else is in.

    Raises:
        FileExistsError: names some of what is there.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{str(folder)!r} is a file: choose another place, or remove it")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise FileExistsError(f"{str(folder)!r} is the folder you are in, or one around it: name one inside it")
    own = _own_files(folder)
    parents = {str(parent) for name in own for parent in Path(name).parents}
    foreign = sorted(name for name in _entries(folder, folders=True) if name not in own | parents)
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise FileExistsError(
            f"{str(folder)!r} is no earlier export, or holds what no export wrote ({', '.join(foreign[:5])}{more}): "
            f"choose another folder, or move that away"
        )


def _own_files(folder: Path) -> set[str]:
    """The files that an earlier export noted; none where there is no record that can be read."""
    for path, name in ((folder / RECORD_FILE, "files"), (folder / INDEX, "_files")):
        try:
            noted = read_json(path).get(name)
        except (OSError, ValueError):
            continue
        if isinstance(noted, list):
            return {file for file in noted if isinstance(file, str)}
    return set()


def _entries(folder: Path, folders: bool = False) -> set[str]:
    """Relative names of all files, and folders, links among them, in ``folder``."""

    def stop(error: OSError) -> None:
        raise error

    found: set[str] = set()
    for place, below, files in os.walk(folder, onerror=stop):
        names = [*files, *(below if folders else ())]
        found |= {os.path.relpath(os.path.join(place, name), folder) for name in names}
    return found

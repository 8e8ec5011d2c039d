"""`unidad sample`: PNGs, named by seed, from an exported directory or a checkpoint."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch

from unidad_pl.backbones.stable_diffusion import StableDiffusionUNet
from unidad_pl.checks import check_at_least
from unidad_pl.data.pictures import as_uint8, grid, is_whole_png, write_png
from unidad_pl.export.student import load_export
from unidad_pl.files import read_json, write_first
from unidad_pl.runs.student import TrainedStudent, Weights, load_student
from unidad_pl.sampling import seeded_noise
from unidad_pl.training.conditions import ClassLabels
from unidad_pl.training.networks import content_hash

RECORD = "sampling.json"
GRID = "grid.png"


def sample(
    model: str,
    num: int,
    out: str,
    seed: int = 0,
    num_steps: int | None = None,
    batch_size: int = 16,
    grid: bool = False,
    weights: Weights = "auto",
    config: str | None = None,
    class_labels: list[int] | None = None,
    prompts: list[str] | None = None,
    device: str = "auto",
) -> Path:
    """Draw images with a few-step student, one PNG per seed; images that are there already, and whole, are kept.

    Several processes may draw into one folder: each leaves out what another has drawn by then.

    Args:
        model: a directory that ``unidad export`` wrote, or a checkpoint.
        num: how many images.
        out: folder for ``000000.png``, ... (named by seed) and ``sampling.json``.
        seed: the first seed.
        num_steps: network evaluations per image; null: as trained.
        batch_size: images drawn at a time; does not change them.
        grid: write all of them into ``grid.png`` too.
        weights: of a checkpoint: ``ema``, ``raw`` or ``auto`` (ema where it has it).
        config: of a checkpoint: its run's config.yaml; null: the one of its run folder.
        class_labels: classes that seeds take in turn, for a class-conditional model; null: those of its training.
        prompts: prompts that seeds take in turn, for a text-to-image model.
        device: ``cpu``, ``cuda``, or ``auto``.

    Returns:
        The folder.

    Raises:
        ValueError: a number below 1, images in ``out`` drawn otherwise, or a model that draws NaN or infinity.
        FileNotFoundError, ValueError: the model cannot be loaded; says why.
        OSError: a file cannot be written.
    """
    check_at_least(1, num=num, batch_size=batch_size, num_steps=num_steps)
    check_at_least(0, seed=seed)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place, folder = Path(model).expanduser(), Path(out).expanduser()
    student = load_student(place, weights, config) if place.is_file() else load_export(place)
    if bool(prompts) != isinstance(student.network, StableDiffusionUNet):
        wanted = "no text-to-image model: leave prompts out" if prompts else "a text-to-image model: give --prompts"
        raise ValueError(f"{model!r} is {wanted}")
    labels = ClassLabels(student.network.num_classes, class_labels or student.classes)
    trained = len(student.sampler)
    if num_steps is not None and num_steps > trained:
        _note(f"the student was trained for {trained} steps; {num_steps} need not be better")
    _look_for_the_token(student.token, prompts or [])
    _record(folder, student, num_steps or trained, labels.classes, prompts)
    seeds = range(seed, seed + num)
    _draw(student, num_steps, labels, prompts, _missing(folder, seeds), batch_size, device, folder)
    if grid:
        _write_grid(folder, seeds)
    return folder


def _missing(folder: Path, seeds: range) -> list[int]:
    """The seeds whose images are not there, or not whole."""
    missing = [s for s in seeds if not is_whole_png(_path(folder, s))]
    if broken := sum(_path(folder, s).is_file() for s in missing):
        _note(f"{broken} of {len(seeds)} images are there but cut short or damaged: they are drawn again")
    if len(missing) < len(seeds):
        sys.stderr.write(f"{len(seeds) - len(missing)} of {len(seeds)} images are there already\n")
    return missing


def _note(text: str) -> None:
    sys.stderr.write(f"note: {text}\n")


def _look_for_the_token(token: str | None, prompts: list[str]) -> None:
    """Say which prompts do not name the subject that the student was trained on."""
    without = [p for p in prompts if token and not re.search(rf"(?<!\w){re.escape(token)}(?!\w)", p, re.IGNORECASE)]
    if without:
        _note(
            f"the student's subject is called {token!r}, which is not in {', '.join(map(repr, without))}: these will "
            f"show any other of its class"
        )


def _path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


def _record(
    folder: Path, student: TrainedStudent, num_steps: int, classes: list[int], prompts: list[str] | None
) -> None:
    """Note what the folder's images are drawn with; refuse to mix them with others."""
    now: dict[str, Any] = {"weights_sha256": content_hash(student.network), "num_steps": num_steps, "classes": classes}
    now |= {"prompts": prompts} if prompts else {}
    path = folder / RECORD
    # Before the record is looked for: another process writes that first.
    pictures = next(folder.glob("*.png"), None)
    if pictures and not path.exists():
        raise ValueError(f"{str(folder)!r} holds PNGs but no {RECORD} that says what drew them: give another --out")
    write_first(path, json.dumps(now, indent=2) + "\n")
    before = read_json(
        path, "record of what drew the images beside it", "give another --out, or remove both", finite=True
    )
    other = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
    if other:
        raise ValueError(
            f"{str(folder)!r} holds images drawn otherwise: "
            + ", ".join(f"{name} {a} there, {b} now" for name, (a, b) in other.items())
            + ". Give another --out, or remove them."
        )


def _draw(
    student: TrainedStudent, num_steps: int | None, labels: ClassLabels, prompts: list[str] | None, seeds: list[int],
    batch_size: int, device: str, folder: Path,
) -> None:  # fmt: skip
    from tqdm import tqdm

    network, sampler = student.network.to(device), student.with_steps(num_steps)
    with tqdm(total=len(seeds), unit="image", disable=not seeds) as bar, torch.no_grad():
        for first in range(0, len(seeds), batch_size):
            part = seeds[first : first + batch_size]
            bar.update(len(part))
            part = [one for one in part if not is_whole_png(_path(folder, one))]  # another process may have drawn them
            if not part:
                continue
            if prompts:
                cond: Any = student.codec.embed([prompts[one % len(prompts)] for one in part], device)
            else:
                cond = labels.of_seeds(torch.tensor(part))
            noise = seeded_noise(part, network.image_shape, device)
            drawn = sampler(network, noise, None if cond is None else cond.to(device))
            images = student.codec.decode(drawn)
            if not bool(images.isfinite().all()):
                raise ValueError(f"the model draws NaN or infinity at seeds {part[0]} to {part[-1]}: take another one")
            for one, image in zip(part, as_uint8(images.clamp(-1, 1)), strict=True):
                write_png(image.expand(3, -1, -1), _path(folder, one))


def _write_grid(folder: Path, seeds: range) -> None:
    import numpy as np
    from PIL import Image

    opened = [Image.open(_path(folder, s)).convert("RGB") for s in seeds]
    if len(sizes := {picture.size for picture in opened}) > 1:
        raise ValueError(f"{str(folder)!r} has images of other sizes among its own ({sorted(sizes)}): remove them")
    pictures = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in opened]
    write_png(grid(torch.stack(pictures), None, math.ceil(math.sqrt(len(seeds))), 1), folder / GRID)

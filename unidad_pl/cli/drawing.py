"""Drawing pictures with a trained student, one PNG for each seed."""

from __future__ import annotations

import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from unidad_pl.condition import Condition
from unidad_pl.data.pictures import as_uint8, grid, is_whole_png, write_png
from unidad_pl.export.student import load_export
from unidad_pl.files import read_json, write_first
from unidad_pl.runs.student import TrainedStudent, Weights, load_student
from unidad_pl.sampling import FewStepSampler, Noise, seeded_noise
from unidad_pl.training.conditions import ClassLabels
from unidad_pl.training.networks import content_hash

RECORD = "sampling.json"
GRID = "grid.png"


def load_model(model: Path, weights: Weights, config: str | None) -> TrainedStudent:
    """The student of a checkpoint, or of a directory that ``unidad export`` wrote."""
    return load_student(model, weights, config) if model.is_file() else load_export(model)


def device_of(name: str) -> str:
    """``name``, or for ``auto`` the GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def drawn(
    student: TrainedStudent, sampler: FewStepSampler, noise: Noise, cond: Condition | None, seeds: list[int]
) -> torch.Tensor:
    """Pictures [B, C, H, W] in [-1, 1]; ``seeds`` are what an error names.

    Raises:
        ValueError: the model draws NaN or infinity.
    """
    images = student.codec.decode(sampler(student.network, noise, cond))
    if not bool(images.isfinite().all()):
        raise ValueError(f"the model draws NaN or infinity at seeds {seeds[0]} to {seeds[-1]}: take another one")
    return images.clamp(-1, 1)


class Drawing:
    """A student with all that decides what it draws.

        >>> drawing = Drawing(Path("export"), "auto", None, None, None, None)  # doctest: +SKIP
        >>> drawing.draw(Path("images"), range(64), batch_size=16, device="cpu")  # doctest: +SKIP

    Args:
        model: a directory that ``unidad export`` wrote, or a checkpoint.
        weights: of a checkpoint.
        config: of a checkpoint; None: beside it.
        num_steps: network evaluations for each image; None: as trained.
        class_labels: that seeds take in turn; None: those of the training.
        prompts: that seeds take in turn, for a text-to-image model.

    Raises:
        ValueError: prompts for a model that takes none, or none for one that does.
        FileNotFoundError, ValueError: the model cannot be loaded; says why.
    """

    def __init__(
        self,
        model: Path,
        weights: Weights,
        config: str | None,
        num_steps: int | None,
        class_labels: list[int] | None,
        prompts: list[str] | None,
    ) -> None:
        self.student = load_model(model, weights, config)
        if bool(prompts) != self.student.network.takes_prompts:
            wanted = "no text-to-image model: leave prompts out" if prompts else "a text-to-image model: give --prompts"
            raise ValueError(f"{str(model)!r} is {wanted}")
        self.labels = ClassLabels(self.student.network.num_classes, class_labels or self.student.classes)
        self.prompts, self.sampler = prompts or [], self.student.with_steps(num_steps)
        if len(self.sampler) > (trained := len(self.student.sampler)):
            _note(f"the student was trained for {trained} steps; {len(self.sampler)} need not be better")
        _look_for_the_token(self.student.token, self.prompts)

    def draw(self, folder: Path, seeds: range, batch_size: int, device: str) -> None:
        """Write the images of ``seeds`` into ``folder``; those that are there and whole are kept.

        Raises:
            ValueError: the images there were drawn otherwise, or the model draws NaN or infinity.
            OSError: a file cannot be written.
        """
        from tqdm import tqdm

        self._record(folder)
        missing = _missing(folder, seeds)
        device = device_of(device)
        self.student.network.to(device)
        written: list[Any] = []
        with (
            tqdm(total=len(missing), unit="image", disable=not missing) as bar,
            torch.no_grad(),
            ThreadPoolExecutor() as pool,  # files are written while the next images are drawn
        ):
            for first in range(0, len(missing), batch_size):
                part = missing[first : first + batch_size]
                bar.update(len(part))
                part = [one for one in part if not is_whole_png(_path(folder, one))]  # another process was faster
                if not part:
                    continue
                images = as_uint8(self._images(part, device))
                for writing in written:  # of the batch before; what a thread could not write is raised here
                    writing.result()
                pairs = zip(part, images, strict=True)
                written = [pool.submit(write_png, image.expand(3, -1, -1), _path(folder, one)) for one, image in pairs]
            for writing in written:
                writing.result()

    def _images(self, seeds: list[int], device: str) -> torch.Tensor:
        if self.prompts:
            prompts = [self.prompts[one % len(self.prompts)] for one in seeds]
            cond: Condition | None = self.student.codec.embed(prompts, device)
        else:
            cond = Condition.of(self.labels.of_seeds(torch.tensor(seeds, device=device)))
        network = self.student.network
        noise = seeded_noise(seeds, network.image_shape, device)
        return drawn(self.student, self.sampler, noise, cond, seeds)

    def _record(self, folder: Path) -> None:
        """Note what the folder's images are drawn with; refuse to mix them with others."""
        now: dict[str, Any] = {"weights_sha256": content_hash(self.student.network)}
        now |= {"num_steps": len(self.sampler), "sigmas": self.sampler.sigmas, "classes": self.labels.classes}
        now |= {"prompts": self.prompts} if self.prompts else {}
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


def write_grid(folder: Path, seeds: range) -> None:
    """All images of ``seeds`` as one picture.

    Raises:
        ValueError: images of several sizes.
    """
    import numpy as np
    from PIL import Image

    opened = [Image.open(_path(folder, s)).convert("RGB") for s in seeds]
    if len(sizes := {picture.size for picture in opened}) > 1:
        raise ValueError(f"{str(folder)!r} has images of other sizes among its own ({sorted(sizes)}): remove them")
    pictures = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in opened]
    write_png(grid(torch.stack(pictures), None, math.ceil(math.sqrt(len(seeds))), 1), folder / GRID)

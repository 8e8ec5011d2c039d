"""One picture per prompt: its samples side by side, and the prompt below them."""

from __future__ import annotations

import re
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from unidad_pl.callbacks.base import EvaluationCallback
from unidad_pl.callbacks.records import run_folder, trained_iterations
from unidad_pl.callbacks.sample_grid import check_given, default_scale, publish
from unidad_pl.checks import check_whole
from unidad_pl.data.pictures import grid
from unidad_pl.metrics.similarity import PromptImages

SMALLEST_FONT = 11


class PromptGrid(EvaluationCallback):
    """Writes ``<run folder>/samples/<stage>_step<step>/<number>_<prompt>.png`` and hands the pictures to the loggers.

        >>> trainer = pl.Trainer(callbacks=[PromptGrid(count=8, columns=4)])

    The step must return ``prompts``.

    Args:
        count: samples of each prompt in its picture: those with the lowest seeds.
        columns: samples per row.
        scale: enlargement by whole pixels; default what makes an image 64 pixels wide or more.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: a number below 1.
    """

    needs_prompts = True

    def __init__(self, count: int = 4, columns: int = 4, scale: int | None = None, **common: Any) -> None:
        super().__init__(**common)
        check_whole(1, count=count, columns=columns)
        check_given(scale=scale)
        self.count, self.columns, self.scale = count, columns, scale
        self.metric: PromptImages = PromptImages()

    def produces(self) -> list[str]:
        return ["prompts"]

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self.metric.update(images, self.needed_prompts(), seeds)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = run_folder(trainer) / "samples" / f"{self.named([stage])[0]}_step{trained_iterations(trainer):08d}"
        for number, (prompt, images) in enumerate(self.metric.samples().items()):
            shown = images[: self.count]
            rows = grid(shown, None, min(self.columns, len(shown)), self.scale or default_scale(images))
            path = folder / f"{number:02d}_{file_name(prompt)}.png"
            publish(trainer, with_caption(rows, prompt), path, f"{stage}/{self.named(['prompts'])[0]}/{number:02d}")


def file_name(prompt: str, longest: int = 60) -> str:
    """``prompt`` in characters that every file system takes."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:longest] or "prompt"


def with_caption(picture: Tensor, text: str) -> Tensor:
    """``picture`` [3, H, W] uint8 above ``text`` in black on white, wrapped to its width: [3, H', W]."""
    from PIL import Image, ImageDraw, ImageFont

    width = picture.shape[2]
    size = max(SMALLEST_FONT, width // 40)
    font = ImageFont.load_default(size)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width - size:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:  # a word wider than the picture continues on the next line
            lines += [""] if font.getlength(lines[-1] + letter) > width - size else []
            lines[-1] += letter
    label = Image.new("RGB", (width, int(1.3 * size * len(lines)) + size), "white")
    ImageDraw.Draw(label).multiline_text((size // 2, size // 2), "\n".join(lines), "black", font, spacing=size // 4)
    return torch.cat([picture, torch.from_numpy(np.array(label)).permute(2, 0, 1)], 1)

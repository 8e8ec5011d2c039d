"""One picture per prompt: its samples side by side, and the prompt under them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from unidad_pl.callbacks.base import STAGES, EvaluationCallback
from unidad_pl.data.pictures import grid, write_png
from unidad_pl.callbacks.records import on_rank_zero, run_folder, trained_steps
from unidad_pl.callbacks.sample_grid import VISIBLE, log_picture
from unidad_pl.metrics.similarity import PromptImages

SMALLEST_FONT = 11


class PromptGrid(EvaluationCallback):
    """Writes ``<run folder>/samples/<stage>_step<step>/<number>_<prompt>.png`` and hands the pictures to the loggers.

    The step must return ``prompts``.

    Args:
        count: samples of each prompt in its picture: those with the lowest seeds.
        columns: samples per row.
        scale: enlargement by whole pixels; default what makes an image 64 pixels wide or more.
        key: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.
        dataloader_idx: see there.
        stages: see there.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self,
        count: int = 4,
        columns: int = 4,
        scale: int | None = None,
        key: str = "samples",
        dataloader_idx: int = 0,
        stages: Sequence[str] = STAGES,
    ) -> None:
        super().__init__(key, dataloader_idx, stages)
        for name, value in (("count", count), ("columns", columns), ("scale", scale)):
            if value is not None and value < 1:
                raise ValueError(f"PromptGrid: {name} must be at least 1, got {value}")
        self.count, self.columns, self.scale = count, columns, scale
        self._metric = PromptImages()

    def begin(self, pl_module: pl.LightningModule) -> None:
        self._metric.to(pl_module.device).reset()

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self._metric.update(images, self.needed_prompts(), seeds)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = run_folder(trainer) / "samples" / f"{stage}_step{trained_steps(trainer):08d}"
        for number, (prompt, images) in enumerate(self._metric.compute().items()):
            shown = images[: self.count]
            scale = -(-VISIBLE // images.shape[3]) if self.scale is None else self.scale
            picture = with_caption(grid(shown, None, min(self.columns, len(shown)), scale), prompt)
            path = folder / f"{number:02d}_{file_name(prompt)}.png"
            on_rank_zero(trainer, str(path), lambda picture=picture, path=path: write_png(picture, path))
            if trainer.is_global_zero:
                log_picture(trainer, f"{stage}/prompts/{number:02d}", picture)


def file_name(prompt: str, most: int = 60) -> str:
    """``prompt`` in letters that every file system takes."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:most] or "prompt"


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
        for letter in word:  # one that is wider than the picture goes on below
            lines += [""] if font.getlength(lines[-1] + letter) > width - size else []
            lines[-1] += letter
    label = Image.new("RGB", (width, int(1.3 * size * len(lines)) + size), "white")
    ImageDraw.Draw(label).multiline_text((size // 2, size // 2), "\n".join(lines), "black", font, spacing=size // 4)
    return torch.cat([picture, torch.from_numpy(np.array(label)).permute(2, 0, 1)], 1)

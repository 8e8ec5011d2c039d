"""`unidad sample`: PNGs, named by seed, from an exported directory or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from unidad_pl.checks import check_at_least
from unidad_pl.files import expanded, sharing
from unidad_pl.seeds import MOST_SEED


def sample(
    model: str,
    num: int,
    out: str,
    seed: int = 0,
    num_steps: int | None = None,
    batch_size: int = 16,
    grid: bool = False,
    weights: Literal["auto", "ema", "raw"] = "auto",
    config: str | None = None,
    class_labels: list[int] | None = None,
    prompts: list[str] | None = None,
    device: str = "auto",
) -> Path:
    """Draw images with a few-step student, one PNG per seed; images that are there already, and whole, are kept.

    Several processes may draw into one folder: each leaves out what another has drawn by then. What one that was killed
    had begun to write is deleted.

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
    check_at_least(0, MOST_SEED, seed=seed)
    from unidad_pl.cli.drawing import Drawing, write_grid  # what loads torch and Lightning; --help need not wait

    folder, seeds = expanded(out), range(seed, seed + num)
    drawing = Drawing(expanded(model), weights, config, num_steps, class_labels, prompts)
    with sharing(folder):
        drawing.draw(folder, seeds, batch_size, device)
        if grid:
            write_grid(folder, seeds)
    return folder

"""``unidad sample`` against a bare loop of the same batches that writes no file: CPU and wall seconds.

    python -m tests.benchmarks sampling [--images 512] [--batch_size 64] [--out FILE]

The student is the quickstart's after one iteration: 32 px, three steps. Above 1, the bare loop is faster.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks.measuring import keep
from unidad_pl.cli.drawing import Drawing
from unidad_pl.cli.lightning import run
from unidad_pl.export.student import export_student
from unidad_pl.sampling import seeded_noise

ROOT = Path(__file__).resolve().parents[2]


def exported(folder: Path) -> Path:
    """A student to draw with."""
    run(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.max_steps", "1", "--summary", "false",
         "--trainer.limit_val_batches", "0", "--model.target_teacher.adaptation.pretrain", "0",
         "--model.target_teacher.adaptation.until", "1", "--trainer.logger", "TensorBoardLogger",
         "--trainer.logger.save_dir", str(folder),
         "--checkpoint.every_n_train_steps", "1"])  # fmt: skip
    return export_student(str(next(folder.rglob("last.ckpt"))), str(folder / "export"))


def measured(model: Path, images: int, batch_size: int, repetitions: int = 3) -> dict[str, float]:
    """Medians of both, which take turns, and the ratios of the turns' medians."""
    drawing = Drawing(model, "auto", None, None, None, None)
    network, sampler = drawing.student.network, drawing.sampler

    def command(folder: Path) -> None:
        drawing.draw(folder, range(images), batch_size, "cpu")

    def loop(_: Path) -> None:
        with torch.no_grad():
            for first in range(0, images, batch_size):
                seeds = range(first, min(first + batch_size, images))
                sampler(network, seeded_noise(seeds, network.image_shape, "cpu")).clamp(-1, 1)

    things: dict[str, Callable[[Path], None]] = {"unidad sample": command, "bare loop": loop}
    cpu: dict[str, list[float]] = {name: [] for name in things}
    wall: dict[str, list[float]] = {name: [] for name in things}
    for number in range(repetitions + 1):
        for name, thing in things.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.process_time(), time.perf_counter()
                thing(Path(folder))
                if number:
                    cpu[name].append(time.process_time() - began[0])
                    wall[name].append(time.perf_counter() - began[1])
    found = {f"{name}, CPU s": statistics.median(own) for name, own in cpu.items()}
    found |= {f"{name}, wall s": statistics.median(own) for name, own in wall.items()}
    return found | {
        f"ratio, {unit}": found[f"unidad sample, {unit} s"] / found[f"bare loop, {unit} s"] for unit in ("CPU", "wall")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keep(measured(exported(Path(folder)), given.images, given.batch_size), given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

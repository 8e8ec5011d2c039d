"""Run folders made by hand, with everything that a run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

SIZE, SHOTS, KEPT = 8, 2, 3
CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "model": {"class_path": "unidad_pl.UniDAD", "init_args": {"student": {"num_steps": 3, "sigma_min": 0.3}}},
    "data": {"class_path": "unidad_pl.FewShotDataModule",
             "init_args": {"root": "builtin:cats", "reference": {"root": None, "exclude_shots": True}}},
    "trainer": {"max_steps": 20},
}  # fmt: skip
START = {"time": "2026-01-02T03:04:05+00:00", "stage": "fit", "packages": {"torch": "9.8.7"}, "processor": "Abacus 3",
         "gpus": [], "cores": 2, "precision": "32-true"}  # fmt: skip


def noise(path: Path, height: int = SIZE, width: int = SIZE, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_events(folder: Path, first: int = 0, last: int = 20, offset: float = 0.0) -> None:
    with SummaryWriter(str(folder)) as writer:
        for step in range(first, last):
            writer.add_scalar("loss/fake", offset + step, step, walltime=1000 + step)
            writer.add_scalar("balance/dmd_source", 2.0, step, walltime=1000 + step)


def evaluation(step: int, fid: float, **others: Any) -> dict[str, Any]:
    return {"metric": "FID", "values": {"fid": fid, "kid": None}, "stage": "val", "step": step, "samples": 12,
            "reference": 40, "extractor": "tiny", "tflops": step / 4, **others}  # fmt: skip


def clusters(step: int) -> dict[str, Any]:
    row = {"nearest": [[4, 0.05], [7, 0.5]], "most_different": [[9, 1.5]]}
    return evaluation(step, 0) | {
        "metric": "IntraLPIPS", "values": {"intra_lpips": 0.4}, "resolution": [SIZE, SIZE], "threshold": 0.1,
        "cluster_sizes": [3, 0], "cluster_means": [0.7, None], "nearest_of_reference": 0.9, "nearest_mean": 0.6,
        "picture": f"samples/clusters/val_step{step:08d}.png",
        "clusters": [row, {"nearest": [], "most_different": []}],
    }  # fmt: skip


def make_run(folder: Path, **config: Any) -> Path:
    """A run of 20 iterations with evaluations at 10 and 20, the first of them the better one."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | config))
    records = [evaluation(10, 5.0), clusters(10), evaluation(20, 7.0), clusters(20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (folder / "environment.jsonl").write_text(json.dumps(START) + "\n")
    (folder / "cost.json").write_text(json.dumps({"tflops": 5.0, "evaluations": {"student": 60}}))
    write_events(folder)
    for step in (10, 20):
        noise(folder / f"samples/val_step{step:08d}.png", seed=step)
        noise(folder / f"samples/clusters/val_step{step:08d}.png", SHOTS * SIZE, (1 + 2 * KEPT) * SIZE)
        for name in ("student", "target_teacher", "source_teacher"):
            noise(folder / f"samples/networks/val_step{step:08d}/{name}.png", 2 * SIZE, 4 * SIZE)
    for name in ("last.ckpt", "epoch=0-step=10.ckpt"):
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / name).touch()
    return folder

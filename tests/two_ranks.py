"""Trains a tiny Uni-DAD on N gloo processes and writes each rank's weights: ``python -m tests.two_ranks N FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.worlds import Stream, fit, random_images, tiny_unet
from unidad_pl.modules import Optimization, UniDAD


def main(ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    setting = Optimization(lr=1e-3, warmup=0)
    module = UniDAD(
        tiny_unet(), student_every=2, target_weight=0.5, ema_decay=0.9, accumulate=2 // ranks,
        student_optimization=setting, fake_optimization=setting, target_optimization=setting,
    )  # fmt: skip
    options = {"devices": ranks, "strategy": "unidad_ddp", "use_distributed_sampler": False} if ranks > 1 else {}
    trainer = fit(module, 4, Stream(random_images(), batch_size=4 // ranks, flip=True), **options)
    assert trainer.world_size == ranks
    assert trainer.global_step == 4
    state = {k: v for k, v in module.state_dict().items() if not k.startswith("source_teacher.")}
    torch.save(state, folder / f"ranks{ranks}_{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

"""Networks sliced over two gloo ranks, for test_sharding.py: ``python -m tests.sharding_script FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.fault_script import NaN, two_ranks, unidad
from tests.fault_script import train as train_whole
from tests.worlds import fit, groups, random_images, tiny_unet
from unidad_pl import Diffusion, ExportOptions, MemoryOptions, OptimizerOptions, UniDAD
from unidad_pl.callbacks import LossBalance, SampleGrid
from unidad_pl.data import Evaluation, FewShotDataModule
from unidad_pl.runs.checkpoints import DurableCheckpointIO
from unidad_pl.strategies.fsdp import ShardedStrategy, local_shard

# Adam with a large eps: a plain Adam step is the sign of the gradient, which rounding may turn.
SMOOTH = OptimizerOptions(lr=3e-2, warmup=0, arguments={"eps": 1.0})
SMOOTHLY: dict[str, Any] = dict(
    student__optimizer=SMOOTH, fake_score__optimizer=SMOOTH, target_teacher__adaptation__optimizer=SMOOTH
)
STEPS = 4


class Pictures(FewShotDataModule):
    """Six pictures; three seeds in batches of one: two for the first rank, one for the second."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        evaluation = Evaluation(val_samples=3, test_samples=3, batch_size=1)
        super().__init__(folder, shots=6, resolution=16, batch_size=batch_size, evaluation=evaluation)


def train(module: pl.LightningModule, steps: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    data = options.pop("data", None) or Pictures(Path(os.environ["PICTURES"]), 4)
    strategy = ShardedStrategy(timedelta(seconds=60), "gloo")
    return fit(module, steps, data, devices=2, strategy=strategy, use_distributed_sampler=False,
               callbacks=list(callbacks), plugins=[DurableCheckpointIO()], **options)  # fmt: skip


def make(**options: Any) -> UniDAD:
    return unidad(**(SMOOTHLY | dict(training__accumulate=2) | options))


def sliced(rank: int, folder: Path) -> dict[str, Any]:
    """Everything that a run does: training, validation with uneven shares of the seeds, gradient norms, checkpoints."""
    module = make(memory=MemoryOptions(checkpointing="both"))
    grid = SampleGrid(count=3, scale=1, shots_on_top=False)
    keep = ModelCheckpoint(folder / "sliced", "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = train(module, STEPS, keep, grid, LossBalance(every_n_iterations=2), default_root_dir=folder / "run",
                    enable_checkpointing=True, limit_val_batches=1.0, val_check_interval=2,
                    check_val_every_n_epoch=None)  # fmt: skip
    trainer.test(module, Pictures(Path(os.environ["PICTURES"]), 4), ckpt_path=folder / "sliced" / "step=2.ckpt")
    parameters = dict(module.named_parameters())
    return {
        "own": {name: local_shard(p).numel() for name, p in parameters.items()},
        "all": {name: p.numel() for name, p in parameters.items()},
        "moments": sum(
            local_shard(v).numel() for o in trainer.optimizers for s in o.state.values() for v in s.values()
        ),
    }


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """From the checkpoint of the sliced run, and from that of one process."""
    for name in ("sliced", "whole"):
        trainer = train(make(), STEPS, ckpt_path=folder / name / "step=2.ckpt")
        trainer.save_checkpoint(folder / f"{name}_resumed.ckpt")
    return {}


def nan(rank: int, folder: Path) -> dict[str, Any]:
    module = make(kind=NaN, student__update_every=1, training__accumulate=1)
    trainer = train(module, 4)
    finite = all(bool(local_shard(p).isfinite().all()) for p in module.parameters())
    steps = [int(next(iter(o.state.values()))["step"]) for o in trainer.optimizers]
    return {"steps": steps, "finite": finite, "global_step": trainer.global_step}


def exported(rank: int, folder: Path) -> dict[str, Any]:
    module = Diffusion(
        tiny_unet(), **groups(optimizer=SMOOTH, training__ema_decay=0.5, export=ExportOptions(str(folder / "exported")))
    )
    trainer = train(module, 2, precision="bf16-mixed")
    trainer.save_checkpoint(folder / "diffusion.ckpt")
    return {}


def alone(folder: Path) -> None:
    """One process with the batch of both; and on from the sliced run's checkpoint."""
    data = Pictures(Path(os.environ["PICTURES"]), 8)
    keep = ModelCheckpoint(folder / "whole", "{step}", every_n_train_steps=2, save_top_k=-1)
    train_whole(make(training__accumulate=4), STEPS, keep, ranks=1, data=data, enable_checkpointing=True)
    trainer = train_whole(
        make(training__accumulate=4), STEPS, ranks=1, data=data, ckpt_path=folder / "sliced" / "step=2.ckpt"
    )
    trainer.save_checkpoint(folder / "unsliced.ckpt")


def main(folder: Path) -> None:
    from torchvision.io import write_png

    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "PICTURES": str(folder / "pictures")}
    (folder / "pictures").mkdir()
    for number, picture in enumerate(random_images()):
        write_png(picture, str(folder / "pictures" / f"{number}.png"))
    for case in (sliced, alone, resumed, nan, exported):
        if case is alone:
            alone(folder)
            continue
        two_ranks(case, folder)
        for rank in range(2):
            result = json.loads((folder / f"{case.__name__}{rank}.json").read_text())
            if "error" in result:
                raise RuntimeError(f"{case.__name__}, rank {rank}: {result['error']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Networks sliced over two gloo ranks, for strategies/test_fsdp.py: ``python -m tests.sharding_script FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.fault_script import SMOOTH, VALIDATING, NaN, fit_nan, prepare
from tests.fault_script import train as train_whole
from tests.pairs import two_ranks
from tests.worlds import Layers, groups, optimizers, save_pictures, tiny_unet, unidad
from unidad_pl import DenoiserSource, Diffusion, ExportOptions, UniDAD
from unidad_pl.callbacks import LossBalance, SampleGrid
from unidad_pl.data import Evaluation, FewShotDataModule
from unidad_pl.strategies.fsdp import ShardedStrategy, local_shard

STEPS = 2
SMALL = tiny_unet(channels=(16,), attention_levels=(0,))


class Pictures(FewShotDataModule):
    """Six pictures; three seeds in batches of one: two for the first rank, one for the second."""

    def __init__(self, batch_size: int = 4) -> None:
        evaluation = Evaluation(val_samples=3, test_samples=3, batch_size=1)
        super().__init__(Path(os.environ["PICTURES"]), 6, 16, batch_size=batch_size, evaluation=evaluation)


def train(module: pl.LightningModule, steps: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    strategy = ShardedStrategy(timedelta(seconds=60), "gloo")
    return train_whole(module, steps, *callbacks, data=Pictures(), strategy=strategy, **options)


def make(source: DenoiserSource | None = None, **options: Any) -> UniDAD:
    """One level: what takes its time is each sharded tensor by itself."""
    settings = dict(training__accumulate=2, student__num_steps=2, student__update_every=1) | optimizers(SMOOTH)
    return unidad(source or SMALL, **(settings | options))


def sliced(folder: Path) -> dict[str, Any]:
    """Everything that a run does: training, validation with uneven shares of the seeds, gradient norms, checkpoints."""
    module = make(memory__checkpointing="both")
    grid = SampleGrid(count=3, scale=1, shots_on_top=False)
    keep = ModelCheckpoint(folder / "sliced", "{step}", every_n_train_steps=1, save_top_k=-1)
    options = dict(
        default_root_dir=folder / "run", enable_checkpointing=True, **(VALIDATING | {"val_check_interval": 1})
    )
    trainer = train(module, STEPS, keep, grid, LossBalance(every_n_iterations=1), **options)
    trainer.test(module, Pictures(), ckpt_path=folder / "sliced" / "step=1.ckpt")
    parameters = dict(module.named_parameters())
    moments = [v for o in trainer.optimizers for state in o.state.values() for v in state.values()]
    return {
        "own": {name: local_shard(p).numel() for name, p in parameters.items()},
        "all": {name: p.numel() for name, p in parameters.items()},
        "moments": sum(local_shard(v).numel() for v in moments),
    }


def resumed(folder: Path) -> None:
    """From the checkpoint of the sliced run, and from that of one process."""
    for name in ("sliced", "whole"):
        trainer = train(make(), STEPS, ckpt_path=folder / name / "step=1.ckpt")
        trainer.save_checkpoint(folder / f"{name}_resumed.ckpt")


def exported(folder: Path) -> None:
    export = ExportOptions(str(folder / "exported"))
    module = Diffusion(SMALL, SMOOTH, export=export, **groups(training__ema_decay=0.5))
    train(module, 2, precision="bf16-mixed").save_checkpoint(folder / "diffusion.ckpt")


def whole(folder: Path) -> None:
    """One process with the batch of both."""
    module = make(training__accumulate=4)
    keep = ModelCheckpoint(folder / "whole", "{step}", every_n_train_steps=1, save_top_k=-1)
    train_whole(module, STEPS, keep, ranks=1, data=Pictures(8), enable_checkpointing=True)


def unsliced(folder: Path) -> None:
    """On from the sliced run's checkpoint, in one process."""
    path = folder / "sliced" / "step=1.ckpt"
    trainer = train_whole(make(training__accumulate=4), STEPS, ranks=1, data=Pictures(8), ckpt_path=path)
    trainer.save_checkpoint(folder / "unsliced.ckpt")


def sharded(rank: int, folder: Path) -> dict[str, Any]:
    """All of it in one pair of processes: what DTensor has to work out for each operation, it works out once."""
    results = {"sliced": sliced(folder), "nan": fit_nan(make(Layers(), kind=NaN, training__accumulate=1), train)}
    exported(folder)
    resumed(folder)
    return results


def main(folder: Path) -> None:
    prepare()
    os.environ["PICTURES"] = str(save_pictures(folder / "pictures"))
    whole(folder)
    two_ranks(folder, sharded)
    unsliced(folder)
    for rank in range(2):
        result = json.loads((folder / f"sharded{rank}.json").read_text())
        if "error" in result:
            raise RuntimeError(f"rank {rank}: {result['error']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

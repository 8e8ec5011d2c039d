"""Two gloo ranks in trouble, for test_faults.py; one case alone: ``python -m tests.fault_script FOLDER NAME``.

Every case forks two processes that have imported everything already, and leaves one JSON file per rank.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.pairs import WAIT, Case, two_ranks
from tests.worlds import Layers, Stream, fit, optimizers, random_images, save_pictures, tiny_unet, unidad, weights_sha
from unidad_pl import OptimizerOptions, UniDAD
from unidad_pl.backbones import LoRA, StableDiffusion
from unidad_pl.callbacks import Preemption
from unidad_pl.data import FewShotDataModule, SubjectDataModule
from unidad_pl.runs import checkpoints
from unidad_pl.runs.checkpoints import DurableCheckpointIO
from unidad_pl.strategies import ManualDDPStrategy
from unidad_pl.strategies.fsdp import local_shard

# Adam with a large eps: a plain Adam step is the sign of the gradient, which rounding may turn.
SMOOTH = OptimizerOptions(lr=3e-2, warmup=0, arguments={"eps": 1.0})


def train(module: Any, steps: int, *callbacks: pl.Callback, ranks: int = 2, data: Any = None, timeout: float = 60,
          **options: Any) -> pl.Trainer:  # fmt: skip
    strategy = ManualDDPStrategy(timeout=timedelta(seconds=timeout)) if ranks > 1 else "auto"
    settings: dict[str, Any] = dict(devices=ranks, strategy=strategy, use_distributed_sampler=False,
                                    callbacks=list(callbacks), plugins=[DurableCheckpointIO()])  # fmt: skip
    return fit(module, steps, data or Stream(random_images(), batch_size=2, flip=True), **(settings | options))


def small(kind: type[UniDAD] = UniDAD, **flat: Any) -> UniDAD:
    """Two layers, one step: what is lost or said in trouble does not depend on the networks."""
    return unidad(Layers(), kind, **(dict(student__num_steps=1) | flat))


def networks(**flat: Any) -> UniDAD:
    """One level, one step: what training on two ranks comes to."""
    return unidad(tiny_unet(channels=(8,), attention_levels=()), student__num_steps=1, **flat)


class At(pl.Callback):
    """Does something at the begin of one iteration, on one rank."""

    def __init__(self, iteration: int, rank: int, action: Callable[[], Any]) -> None:
        self.iteration, self.rank, self.action = iteration, rank, action

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.iteration and trainer.global_rank == self.rank:
            self.action()


def alone(folder: Path) -> None:
    """One process with the batch of both."""
    module = networks(training__accumulate=4)
    train(module, 4, ranks=1, precision="64-true", data=Stream(random_images(), batch_size=8, flip=True))
    torch.save(module.state_dict(), folder / "alone.pt")


def equal(rank: int, folder: Path) -> dict[str, Any]:
    """Four iterations, accumulation 2, every network trained; what went over the wire."""
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **options)

    dist.all_reduce = counted
    module = networks(training__accumulate=2)
    train(module, 4, precision="64-true", data=Stream(random_images(), batch_size=4, flip=True))
    torch.save(module.state_dict(), folder / f"rank{rank}.pt")
    trained = {name: [p for part in group for p in part["params"]] for name, group in module.groups().items()}
    return {"sent": sent} | {name: sum(p.numel() * p.element_size() for p in ps) for name, ps in trained.items()}


def adapters(rank: int | None, folder: Path) -> None:
    """Adapters over one base on two ranks; without a rank: one process with the batch of both."""
    alone = rank is None
    module = unidad(
        StableDiffusion(str(folder / "sd"), lora=LoRA(rank=2)), **optimizers(dataclasses.replace(SMOOTH, lr=1.0)),
        student__num_steps=2, student__update_every=1, matching__noise_table="model", matching__guidance_scale=2.0,
        training__ema_decay=0.5,
        training__accumulate=2 if alone else 1,
    )  # fmt: skip
    data = SubjectDataModule(str(folder / "dog"), "dog", resolution=16, batch_size=4 if alone else 2)
    train(module, 2, ranks=1 if alone else 2, data=data)
    torch.save(module.state_dict(), folder / ("adapters_alone.pt" if alone else f"adapters{rank}.pt"))


class NaN(UniDAD):
    """A student loss that is not a number, on rank 1, in the second iteration."""

    def student_loss(self, x: torch.Tensor, *cond: torch.Tensor | None) -> torch.Tensor:
        loss = super().student_loss(x, *cond)
        return loss * float("nan") if int(self.iteration) == 1 and self.global_rank == 1 else loss


def fit_nan(module: UniDAD, trains: Callable[..., pl.Trainer]) -> dict[str, Any]:
    """What three iterations of ``trains`` come to."""
    trainer = trains(module, 3)
    finite = all(bool(local_shard(p).isfinite().all()) for p in module.parameters())
    steps = [int(next(iter(o.state.values()))["step"]) for o in trainer.optimizers]
    return {"steps": steps, "finite": finite, "global_step": trainer.global_step}


def nan(rank: int, folder: Path) -> dict[str, Any]:
    module = small(kind=NaN, student__update_every=1)
    return fit_nan(module, train) | {"sha": weights_sha(module)}


def nan_for_good(rank: int, folder: Path) -> None:
    train(small(kind=NaN, student__update_every=1, training__max_skipped=1), 3)


def killed(rank: int, folder: Path) -> None:
    train(small(), 6, At(1, 1, die))


def hung(rank: int, folder: Path) -> None:
    train(small(), 6, At(1, 1, lambda: time.sleep(100)), timeout=12)


def frozen(rank: int, folder: Path) -> None:
    """Rank 0, where the store of the group lives, is stopped."""
    train(small(), 6, Preemption(), At(1, 0, lambda: os.kill(os.getpid(), signal.SIGSTOP)), timeout=12)


def other_batch(rank: int, folder: Path) -> None:
    train(small(), 6, data=FewShotDataModule("builtin:sunglasses", 3, 16, batch_size=2 + rank))


def other_shots(rank: int, folder: Path) -> None:
    train(small(), 6, data=FewShotDataModule(f"builtin:{('sunglasses', 'cats')[rank]}", 3, 16, batch_size=2))


def other_rate(rank: int, folder: Path) -> None:
    train(small(**optimizers(dataclasses.replace(SMOOTH, lr=1e-3 * (1 + rank)))), 6)


class Losing(Stream):
    """Rank 1's pictures vanish after the first batch."""

    def train_dataloader(self) -> Any:
        loader: Any = super().train_dataloader()
        stream = loader.dataset
        whole = stream.batch_at

        def batch_at(positions: range) -> Any:
            if stream.rank == 1 and positions.start >= 4:
                raise FileNotFoundError("no such picture: shots/3.png")
            return whole(positions)

        stream.batch_at = batch_at
        return loader


def missing_file(rank: int, folder: Path) -> None:
    train(small(), 6, data=Losing(random_images(), batch_size=2))


class BrokenMetric(pl.Callback):
    """A metric that fails on rank 0 alone, before the others meet it."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 0:
            raise ZeroDivisionError("FID: the reference set is empty")
        trainer.strategy.barrier()


def broken_metric(rank: int, folder: Path) -> None:
    train(small(), 6, BrokenMetric(), **VALIDATING)


def full_disk(rank: int, folder: Path) -> None:
    """Rank 0 may write no file of more than 10 kB."""
    trainer = train(small(), 1)
    trainer.save_checkpoint(folder / "disk" / "x.ckpt")
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    trainer.save_checkpoint(folder / "disk" / "x.ckpt")


def preempted(rank: int, folder: Path) -> None:
    """Rank 1 alone gets the signal, in its second iteration."""
    usr1 = At(1, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    train(small(), 50, Preemption(exit_code=77), usr1, default_root_dir=folder)


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """Runs after :func:`preempted`: to iteration 4, from its checkpoint and from the start."""
    again, whole = small(), small()
    train(again, 4, ckpt_path=folder / "checkpoints" / "preempted.ckpt")
    train(whole, 4)
    return {"resumed": weights_sha(again), "whole": weights_sha(whole)}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieIn(pl.Callback):
    """kill -9 in the second iteration: in the training step, at a validation, or while its checkpoint is written."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 1:
            return
        places = {"training": (UniDAD, "fake_loss"), "between the steps": (UniDAD, "finish_iteration"),
                  "validation": (UniDAD, "validation_step"), "sync": (os, "fsync"), "rename": (os, "replace"),
                  "after the rename": (checkpoints, "_sync_folder")}  # fmt: skip
        if self.moment == "write":
            write = checkpoints._Sink.write

            def half(sink: Any, data: bytes) -> int:
                if sink.file.tell() > 10_000:
                    sink.file.flush()
                    die()
                return write(sink, data)

            checkpoints._Sink.write = half  # type: ignore[method-assign]
        else:
            owner, name = places[self.moment]
            setattr(owner, name, lambda *args, **options: die())


MOMENTS = ("training", "between the steps", "write", "sync", "rename", "after the rename", "validation")
RANDOM = ("in the first third", "in the second third", "in the last third")  # of the time of a run
VALIDATING: dict[str, Any] = dict(limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None)


def saving(folder: Path, *callbacks: pl.Callback, **options: Any) -> UniDAD:
    """Three iterations on one process, a checkpoint and a validation after each."""
    module = small()
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    train(module, 3, *callbacks, keep, ranks=1, enable_checkpointing=True, **VALIDATING, **options)
    return module


class FirstStep(pl.Callback):
    """Notes when the first iteration of a run begins."""

    time: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.time = self.time or time.monotonic()


def resume_after(dead: Any, place: Path) -> dict[str, Any]:
    """What a run makes of what ``dead`` left in ``place``, and how long until it trains again."""
    began, first = time.monotonic(), FirstStep()
    newest, passed_over = checkpoints.newest_intact(place)
    module = saving(place, first, ckpt_path=newest)
    return {"died": dead.exitcode, "from": newest.name if newest else None, "damaged": len(passed_over),
            "sha": weights_sha(module), "seconds": (first.time or time.monotonic()) - began}  # fmt: skip


def victim(place: Path, *own: pl.Callback) -> None:
    torch.set_num_threads(1)  # as in child()
    saving(place, *own)


def kill_9(folder: Path) -> None:
    """Every moment, chosen or random, and what a resumed run makes of what is left."""
    fork = multiprocessing.get_context("fork")
    began = time.monotonic()
    result: dict[str, Any] = {"whole": weights_sha(saving(folder / "whole"))}
    whole, draw = time.monotonic() - began, random.Random(0)
    for moment in (*MOMENTS, *RANDOM):
        place = folder / moment
        own = [DieIn(moment)] if moment in MOMENTS else []
        dead = fork.Process(target=victim, args=(place, *own))
        dead.start()
        dead.join(WAIT if own else (RANDOM.index(moment) + draw.random()) / len(RANDOM) * whole)
        if not own:
            dead.kill()
            dead.join()
        result[moment] = resume_after(dead, place)
    (folder / "kill_9.json").write_text(json.dumps(result))


# Those of one row run at the same time: they wait for each other, and use little of a processor.
WAITING: tuple[Case, ...] = (killed, hung, frozen)  # for a timeout, while all the others run
CASES: tuple[tuple[Case, ...], ...] = (
    (preempted, missing_file, broken_metric),
    (resumed, full_disk, nan, nan_for_good),
    (other_batch, other_shots, other_rate),
    (equal,),
    (adapters,),
)


def prepare() -> None:
    """What building a first network imports, once and not in every rank."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    networks().configure_model()


def main(folder: Path, names: list[str]) -> None:
    prepare()
    waiting = [case for case in WAITING if not names or case.__name__ in names]
    two_ranks(folder, *waiting, meanwhile=lambda: others(folder, names))


def others(folder: Path, names: list[str]) -> None:
    own: dict[Case, Callable[[], Any]] = {equal: lambda: alone(folder), adapters: lambda: adapters(None, folder)}
    if not names or "adapters" in names:
        from tests.tiny_sd import save_tiny  # not at the top: diffusers asks for GPUs, and forks are refused after that

        save_tiny(folder / "sd")
        save_pictures(folder / "dog", 3)
    for row in CASES:
        cases = [case for case in row if not names or case.__name__ in names]
        two_ranks(folder, *cases, meanwhile=own.get(cases[0]) if cases else None)
    if not names or "kill_9" in names:
        kill_9(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

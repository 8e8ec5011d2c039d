"""Two gloo ranks in trouble, for test_faults.py; one case alone: ``python -m tests.fault_script FOLDER NAME``.

Every case forks two processes that have imported everything already, and leaves one JSON file per rank.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
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
from PIL import Image

from tests.worlds import Stream, fit, groups, random_images, tiny_unet, weights_sha
from unidad_pl import OptimizerOptions, UniDAD
from unidad_pl.backbones import LoRA, StableDiffusion
from unidad_pl.callbacks import Preemption
from unidad_pl.data import SubjectDataModule
from unidad_pl.runs import checkpoints
from unidad_pl.runs.checkpoints import DurableCheckpointIO
from unidad_pl.strategies import ManualDDPStrategy

FAST = OptimizerOptions(lr=1e-3, warmup=0)
Case = Callable[[int, Path], dict[str, Any]]


def unidad(kind: type[UniDAD] = UniDAD, **options: Any) -> UniDAD:
    settings: dict[str, Any] = dict(
        student__update_every=2, target_teacher__weight=0.5, training__ema_decay=0.9,
        student__optimizer=FAST, fake_score__optimizer=FAST, target_teacher__adaptation__optimizer=FAST,
    )  # fmt: skip
    return kind(tiny_unet(), **groups(**(settings | options)))


def train(module: UniDAD, steps: int, *callbacks: pl.Callback, ranks: int = 2, **options: Any) -> pl.Trainer:
    strategy = ManualDDPStrategy(timeout=timedelta(seconds=options.pop("timeout", 60))) if ranks > 1 else "auto"
    data = options.pop("data", None) or Stream(random_images(), batch_size=2, flip=True)
    return fit(module, steps, data, devices=ranks, strategy=strategy, use_distributed_sampler=False,
               callbacks=list(callbacks), plugins=[DurableCheckpointIO()], **options)  # fmt: skip


class At(pl.Callback):
    """Does something at the begin of one iteration, on one rank."""

    def __init__(self, iteration: int, rank: int, action: Callable[[], Any]) -> None:
        self.iteration, self.rank, self.action = iteration, rank, action

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.iteration and trainer.global_rank == self.rank:
            self.action()


def alone(folder: Path) -> None:
    """One process with the batch of both."""
    module = unidad(training__accumulate=4)
    train(module, 10, ranks=1, precision="64-true", data=Stream(random_images(), batch_size=8, flip=True))
    torch.save(module.state_dict(), folder / "alone.pt")


def equal(rank: int, folder: Path) -> dict[str, Any]:
    """Ten iterations, accumulation 2, every network trained; what went over the wire."""
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **options)

    dist.all_reduce = counted
    module = unidad(training__accumulate=2)
    train(module, 10, precision="64-true", data=Stream(random_images(), batch_size=4, flip=True))
    groups = {
        name: sum(p.numel() * p.element_size() for settings in group for p in settings["params"])
        for name, group in module.groups().items()
    }
    torch.save(module.state_dict(), folder / f"rank{rank}.pt")
    return {"sent": sent, "groups": groups}


def adapters(rank: int | None, folder: Path) -> dict[str, Any]:
    """Adapters over one base on two ranks; without a rank: one process with the batch of both."""
    alone = rank is None
    # Adam with a large eps: a plain Adam step is the sign of the gradient, which rounding may turn.
    smooth = OptimizerOptions(lr=1.0, warmup=0, arguments={"eps": 1.0})
    source = StableDiffusion(str(folder / "sd"), lora=LoRA(rank=2))
    module = UniDAD(source, **groups(
        student__num_steps=2, student__update_every=2, target_teacher__weight=0.5, matching__noise_table="model",
        matching__guidance_scale=2.0, training__ema_decay=0.5, training__accumulate=2 if alone else 1,
        student__optimizer=smooth, fake_score__optimizer=smooth, target_teacher__adaptation__optimizer=smooth,
    ))  # fmt: skip
    data = SubjectDataModule(str(folder / "dog"), "dog", resolution=16, batch_size=4 if alone else 2)
    train(module, 4, ranks=1 if alone else 2, data=data)
    torch.save(module.state_dict(), folder / ("adapters_alone.pt" if alone else f"adapters{rank}.pt"))
    return {}


class NaN(UniDAD):
    """A student loss that is not a number, on rank 1, in iteration 2."""

    def student_loss(self, x: torch.Tensor, *cond: torch.Tensor | None) -> torch.Tensor:
        loss = super().student_loss(x, *cond)
        return loss * float("nan") if int(self.iteration) == 2 and self.global_rank == 1 else loss


def nan(rank: int, folder: Path) -> dict[str, Any]:
    module = unidad(NaN, student__update_every=1)
    trainer = train(module, 4)
    finite = all(bool(p.isfinite().all()) for p in module.parameters())
    steps = [int(next(iter(o.state.values()))["step"]) for o in trainer.optimizers]
    return {"steps": steps, "sha": weights_sha(module), "finite": finite, "global_step": trainer.global_step}


def nan_for_good(rank: int, folder: Path) -> dict[str, Any]:
    module = unidad(NaN, student__update_every=1, training__max_skipped=1)
    train(module, 4)
    return {}


def killed(rank: int, folder: Path) -> dict[str, Any]:
    train(unidad(), 6, At(2, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    return {}


def hung(rank: int, folder: Path) -> dict[str, Any]:
    train(unidad(), 6, At(2, 1, lambda: time.sleep(100)), timeout=3)
    return {}


class Losing(Stream):
    """Rank 1's pictures vanish after two batches."""

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        stream: Any = loader.dataset
        whole = stream.batch_at

        def batch_at(positions: range) -> Any:
            if stream.rank == 1 and positions.start >= 2 * 4:
                raise FileNotFoundError("no such picture: shots/3.png")
            return whole(positions)

        stream.batch_at = batch_at
        return loader


def missing_file(rank: int, folder: Path) -> dict[str, Any]:
    train(unidad(), 6, data=Losing(random_images(), batch_size=2))
    return {}


class BrokenMetric(pl.Callback):
    """A metric that fails on rank 0 alone, before the others meet it."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 0:
            raise ZeroDivisionError("FID: the reference set is empty")
        trainer.strategy.barrier()


def broken_metric(rank: int, folder: Path) -> dict[str, Any]:
    train(unidad(), 6, BrokenMetric(), limit_val_batches=1, val_check_interval=2, check_val_every_n_epoch=None)
    return {}


def full_disk(rank: int, folder: Path) -> dict[str, Any]:
    """Rank 0 may write no file of more than 10 kB."""
    trainer = train(unidad(), 1)
    trainer.save_checkpoint(folder / "disk" / "x.ckpt")
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    trainer.save_checkpoint(folder / "disk" / "x.ckpt")
    return {}


def preempted(rank: int, folder: Path) -> dict[str, Any]:
    """Rank 1 alone gets the signal, in iteration 3 (the fourth)."""
    train(unidad(), 50, Preemption(exit_code=77), At(3, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1)),
          default_root_dir=folder)  # fmt: skip
    return {}


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """Runs after :func:`preempted`: to iteration 6, from its checkpoint and from the start."""
    again, whole = unidad(), unidad()
    train(again, 6, ckpt_path=folder / "checkpoints" / "preempted.ckpt")
    train(whole, 6)
    return {"resumed": weights_sha(again), "whole": weights_sha(whole)}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieIn(pl.Callback):
    """kill -9 at a moment of iteration 3: in the training step, at a validation, or while its checkpoint is written."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 3:
            return
        places = {"training": (UniDAD, "fake_loss"), "between the steps": (UniDAD, "finish_iteration"),
                  "validation": (UniDAD, "validation_step"), "sync": (os, "fsync"), "rename": (os, "replace"),
                  "after the rename": (checkpoints, "_sync_folder")}  # fmt: skip
        if self.moment == "write":
            write = checkpoints._Sink.write

            def half(sink: Any, data: bytes) -> int:
                if sink.file.tell() > 200_000:
                    sink.file.flush()
                    die()
                return write(sink, data)

            checkpoints._Sink.write = half  # type: ignore[method-assign]
        else:
            owner, name = places[self.moment]
            setattr(owner, name, lambda *args, **options: die())


MOMENTS = ("training", "between the steps", "write", "sync", "rename", "after the rename", "validation")
RANDOM = ("in the first third", "in the second third", "in the last third")  # of the time of a run


def saving(folder: Path, *callbacks: pl.Callback, **options: Any) -> UniDAD:
    """Six iterations on one process, a checkpoint and a validation after each second one."""
    module = unidad(training__accumulate=2)
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    train(module, 6, *callbacks, keep, ranks=1, enable_checkpointing=True, limit_val_batches=1, val_check_interval=2,
          check_val_every_n_epoch=None, **options)  # fmt: skip
    return module


class FirstStep(pl.Callback):
    """Notes when the first iteration of a run begins."""

    time: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.time = self.time or time.monotonic()


def resume_after(victim: Any, place: Path) -> dict[str, Any]:
    """What a run makes of what ``victim`` left in ``place``, and how long until it trains again."""
    began, first = time.monotonic(), FirstStep()
    newest, passed_over = checkpoints.newest_intact(place)
    module = saving(place, first, ckpt_path=newest)
    return {"died": victim.exitcode, "from": newest.name if newest else None, "damaged": len(passed_over),
            "sha": weights_sha(module), "seconds": (first.time or time.monotonic()) - began}  # fmt: skip


def kill_9(folder: Path) -> None:
    """Every moment, chosen or random, and what a resumed run makes of what is left."""
    fork = multiprocessing.get_context("fork")
    began = time.monotonic()
    result: dict[str, Any] = {"whole": weights_sha(saving(folder / "whole"))}
    whole, draw = time.monotonic() - began, random.Random(0)
    for moment in (*MOMENTS, *RANDOM):
        place = folder / moment
        own = [DieIn(moment)] if moment in MOMENTS else []
        victim = fork.Process(target=saving, args=(place, *own))
        victim.start()
        victim.join(60 if own else (RANDOM.index(moment) + draw.random()) / len(RANDOM) * whole)
        if not own:
            victim.kill()
            victim.join()
        result[moment] = resume_after(victim, place)
    (folder / "kill_9.json").write_text(json.dumps(result))


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        equal,
        adapters,
        nan,
        nan_for_good,
        killed,
        hung,
        missing_file,
        broken_metric,
        full_disk,
        preempted,
        resumed,
    )
}


def child(case: Case, rank: int, folder: Path, port: int) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    began = time.monotonic()
    try:
        result = case(rank, folder)
    except SystemExit as leaving:
        result = {"exit": leaving.code}
    except Exception as error:  # noqa: BLE001 (the test says which it must be)
        result = {"error": f"{type(error).__name__}: {error}"}
    result["seconds"] = time.monotonic() - began
    (folder / f"{case.__name__}{rank}.json").write_text(json.dumps(result))
    os._exit(0)  # not the parent's clean-up


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_ranks(case: Case, folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    port = free_port()
    if case is adapters:
        from tests.tiny_sd import save_tiny  # not at the top: diffusers asks for GPUs, and forks are refused after that

        save_tiny(folder / "sd")
        (folder / "dog").mkdir()
        for i in range(3):
            Image.new("RGB", (20, 20), (60 * i, 200 - 50 * i, 90)).save(folder / "dog" / f"{i}.png")
    ranks = [fork.Process(target=child, args=(case, rank, folder, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    if case is equal:
        alone(folder)
    if case is adapters:
        adapters(None, folder)
    for process in ranks[:1] if case in (hung, killed) else ranks:
        process.join(100)
    for process in ranks:
        process.kill()


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for name in names or [*CASES, "kill_9"]:
        if name == "kill_9":
            kill_9(folder)
        else:
            two_ranks(CASES[name], folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

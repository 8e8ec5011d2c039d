"""A long run of the tiny world under a watch: memory, open files and time of an iteration must stay as they are.

    python -m tests.benchmarks.soak [--iterations 20000]

Checkpoints, a CSV logger and validations are on. Prints what it measured and ends with 1 if something grew: RSS by 1 %
or more over the last half, open files at all over the last half, or the median iteration of the last tenth by more than
5 % over the second tenth. Not run by pytest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from tests.worlds import Stream, fit, groups, random_images, tiny_unet
from unidad_pl import UniDAD
from unidad_pl.callbacks import Preemption
from unidad_pl.runs.checkpoints import DurableCheckpointIO


class Watch(pl.Callback):
    """Process time of every iteration; resident bytes and open files every hundredth of the run.

    Process time, because a shared machine gives a process less of its clock at some times than at others.
    """

    def __init__(self, iterations: int) -> None:
        self.every = max(1, iterations // 100)
        self.seconds: list[float] = []
        self.memory: list[int] = []
        self.files: list[int] = []
        self.began = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self.began = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.process_time() - self.began)
        if len(self.seconds) % self.every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
            self.files.append(len(os.listdir("/proc/self/fd")))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=20_000)
    iterations = parser.parse_args().iterations
    torch.set_num_threads(1)
    watch = Watch(iterations)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        fit(
            UniDAD(
                tiny_unet(), **groups(student__update_every=2, target_teacher__weight=0.5, training__ema_decay=0.99)
            ),
            iterations,
            Stream(random_images(), batch_size=1),
            callbacks=[watch, ModelCheckpoint(folder, every_n_train_steps=max(1, iterations // 50)), Preemption()],
            plugins=[DurableCheckpointIO()],
            logger=CSVLogger(folder),
            enable_checkpointing=True,
            limit_val_batches=1,
            val_check_interval=max(1, iterations // 50),
            check_val_every_n_epoch=None,
            log_every_n_steps=10,
        )
        total = time.monotonic() - began
    half, tenth = len(watch.memory) // 2, len(watch.seconds) // 10
    growth = watch.memory[-1] / watch.memory[half] - 1
    files = watch.files[-1] - watch.files[half]
    early, late = (statistics.median(part) for part in (watch.seconds[tenth : 2 * tenth], watch.seconds[-tenth:]))
    print(f"{iterations} iterations in {total:.0f} s")
    print(f"RSS           {watch.memory[half] / 2**20:.1f} MiB at half, {watch.memory[-1] / 2**20:.1f} MiB at the end")
    print(f"              {100 * growth:+.2f} %, at most {max(watch.memory) / 2**20:.1f} MiB")
    print(f"open files    {watch.files[half]} at half, {watch.files[-1]} at the end")
    print(f"an iteration  {1e3 * early:.2f} ms in the second tenth, {1e3 * late:.2f} ms in the last (process time)")
    return int(growth >= 0.01 or files > 0 or late > 1.05 * early)


if __name__ == "__main__":
    sys.exit(main())

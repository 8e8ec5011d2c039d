"""What an iteration costs as batch, resolution, steps and parameters grow: FLOPs, CPU seconds, peak bytes, and the law.

    python -m tests.benchmarks scaling [--out FILE] [--plot FILE] [--ranks 2]

One thing grows at a time from the reference of ``step`` at 32 px, where the others stand; amortised over r = 5
iterations. The law is the exponent of a straight line through (log FLOPs, log seconds). With ``--ranks``: the share of
an iteration that averaging gradients over so many processes of this machine takes (gloo).
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.benchmarks.measuring import RandomWeights, interleaved, keep
from tests.benchmarks.step import ADM, R, made, ours
from unidad_pl import StudentOptions
from unidad_pl.backbones.adm import ADMSource
from unidad_pl.cli.report_memory import LiveBytes
from unidad_pl.flops import Counting
from unidad_pl.training.stepping import average_gradients

BASE: dict[str, int] = {"batch": 2, "resolution": 32, "steps": 3, "channels": 32}
GROWING: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8), "resolution": (16, 32, 64), "steps": (1, 2, 3, 4), "channels": (32, 64, 96),
}  # fmt: skip


def module_of(resolution: int, steps: int, channels: int) -> Any:
    """The module at one point; its images are of ``resolution``."""
    adm = replace(ADM, image_size=64, num_channels=channels)
    source = RandomWeights(ADMSource("none", adm))
    module = made(source, student=StudentOptions(num_steps=steps))
    for network in (module.student, module.fake_score, module.source_teacher, module.target_teacher):
        network.image_shape = (3, resolution, resolution)  # the network is convolutional
    return module


def point(batch: int, resolution: int, steps: int, channels: int, repetitions: int) -> dict[str, float]:
    """One measurement, amortised but for the peak."""
    module = module_of(resolution, steps, channels)
    iteration, real = ours(module), torch.rand(batch, 3, resolution, resolution) * 2 - 1
    cost: dict[bool, tuple[float, float]] = {}
    for update in (True, False):
        counting = Counting({})
        counting.start()
        iteration(real, update)
        gflop = counting.stop().flops / 1e9
        cost[update] = gflop, interleaved(repetitions, one=lambda update=update: iteration(real, update))["one"]
    live = LiveBytes()
    with live:
        iteration(real, True)
    gflop, seconds = (cost[True][i] / R + cost[False][i] * (R - 1) / R for i in range(2))
    parameters = sum(p.numel() for p in module.student.parameters()) / 1e6
    return {"M parameters": parameters, "GFLOP": gflop, "CPU s": seconds, "peak MB": live.peak / 1e6}


def exponent(points: list[dict[str, float]]) -> float:
    """Slope of log seconds over log FLOPs, by least squares."""
    x, y = ([math.log(one[name]) for one in points] for name in ("GFLOP", "CPU s"))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)


def measured(repetitions: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in GROWING.items():
        found[name] = {str(value): point(**BASE | {name: value}, repetitions=repetitions) for value in values}
    points = [one for row in found.values() for one in row.values()]
    return found | {"exponent of CPU seconds over FLOPs": exponent(points)}


def _rank(rank: int, ranks: int, port: int, shares: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    module = module_of(BASE["resolution"], BASE["steps"], 64)
    iteration, spent = ours(module), [0.0]
    take = module.step

    def averaged(group: str) -> bool:
        began = time.perf_counter()
        average_gradients([p for part in module.groups()[group] for p in part["params"]])
        spent[0] += time.perf_counter() - began
        return take(group)

    module.step = averaged
    real = torch.rand(BASE["batch"], 3, BASE["resolution"], BASE["resolution"]) * 2 - 1
    iteration(real, True)
    dist.barrier()
    spent[0], began = 0.0, time.perf_counter()
    for number in range(R):
        iteration(real, number == 0)
    shares[rank] = spent[0] / (time.perf_counter() - began)
    dist.destroy_process_group()


def share_of_averaging(ranks: int) -> float:
    """Of an iteration's time, the most on any rank: waiting for the others is in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shares = mp.get_context("spawn").Array("d", ranks)
    mp.spawn(_rank, (ranks, port, shares), nprocs=ranks)
    return max(shares)


def plot(found: dict[str, Any], path: str) -> None:
    """Seconds over FLOPs, a line for each thing that grows."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for name in GROWING:
        row = found[name]
        gflop, seconds = ([one[unit] for one in row.values()] for unit in ("GFLOP", "CPU s"))
        axes.plot(gflop, seconds, marker="o", label=f"{name} {', '.join(row)}")
    axes.set(xscale="log", yscale="log", xlabel="GFLOP per iteration", ylabel="CPU seconds per iteration")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plot")
    parser.add_argument("--out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(given.repetitions)
    if given.ranks > 1:
        found[f"share of averaging over {given.ranks} ranks"] = share_of_averaging(given.ranks)
    if given.plot:
        plot(found, given.plot)
    keep(found, given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

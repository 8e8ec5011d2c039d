"""Everything that only a GPU can show, in one command, on a machine without a network.

    python -m tests.benchmarks gpu --out DIR [--minutes 8] [--device cuda]

Parts, in this order, each written to ``DIR/gpu.json`` as it ends: the rate of a plain matrix product; the quickstart,
50 iterations, in bf16, and resumed; the FFHQ-256 model of the paper with random weights, batch 1, 4 and 8. A part that
fails is written down with its error, and the next one begins. None begins after the minutes are over.

A plain PyTorch image lacks: lightning, torchmetrics, diffusers, safetensors, torch-fidelity, lpips, tensorboard,
jsonargparse, and what these need. ``--device cpu --tiny`` tries the command itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.measuring import RandomWeights, machine
from tests.worlds import Stream, fit, random_images, tiny_unet
from unidad_pl import DenoiserSource, UniDAD
from unidad_pl.backbones import ADMConfig
from unidad_pl.backbones.adm import ADMSource
from unidad_pl.cli.lightning import run
from unidad_pl.cli.report_memory import GIB, predict_memory
from unidad_pl.flops import TERA
from unidad_pl.training.rehearsal import Plan

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS, WARM_UP = 25, 10  # five student updates at r = 5
SIZES = (1, 4, 8)


class Machine:
    """The device, and how its time and memory are read."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny, self.cuda = device, tiny, device.startswith("cuda")
        self.accelerator = "gpu" if self.cuda else "cpu"

    def seconds(self, work: Callable[[], object], repetitions: int) -> float:
        """Median seconds of ``work``, the device waited for."""
        times = []
        for _ in range(repetitions):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self) -> float | None:
        """GiB at most since the last call; None where nobody counts."""
        if not self.cuda:
            return None
        found = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
        return found

    def rate(self, dtype: torch.dtype) -> float:
        """TFLOP/s of a square matrix product."""
        side = 256 if self.tiny else 8192
        a, b = torch.randn(2, side, side, device=self.device, dtype=dtype)
        for _ in range(3):
            a @ b
        return 2 * side**3 / self.seconds(lambda: a @ b, 10) / TERA


def matrix_products(own: Machine) -> dict[str, float]:
    torch.set_float32_matmul_precision("high")
    return {str(dtype): own.rate(dtype) for dtype in (torch.bfloat16, torch.float32)}


def quickstart(own: Machine) -> dict[str, Any]:
    """Fifty iterations by the command line in bf16, ten more from the checkpoint; metrics where they were computed."""
    steps = (2, 4) if own.tiny else (50, 60)
    with tempfile.TemporaryDirectory() as folder:
        config = str(ROOT / "configs" / "quickstart.yaml")
        common = ["fit", "--config", config, "--trainer.accelerator", own.accelerator, "--trainer.devices", "1",
                  "--trainer.precision", "bf16-mixed" if own.cuda else "32-true",
                  "--trainer.default_root_dir", folder, "--trainer.logger.save_dir", folder, "--summary", "false",
                  "--model.target_teacher.adaptation.pretrain", "1", "--checkpoint.every_n_train_steps", str(steps[0]),
                  "--trainer.val_check_interval", str(steps[0]), "--data.evaluation.val_samples", "20"]  # fmt: skip
        if own.tiny:
            common += ["--data.reference.root", "builtin:sunglasses:30", "--data.batch_size", "2", "--threads", "1"]
        began = time.perf_counter()
        first = run([*common, "--trainer.max_steps", str(steps[0])])
        took = time.perf_counter() - began
        last = max(Path(folder).rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
        again = run([*common, "--trainer.max_steps", str(steps[1]), "--ckpt_path", str(last)])
        metrics = {name: float(value) for name, value in again.trainer.callback_metrics.items()}
        return {"seconds": took, "iterations": [first.trainer.global_step, again.trainer.global_step],
                "metrics": metrics, "peak_gib": own.peak()}  # fmt: skip


class Timed(UniDAD):
    """Keeps the seconds of every iteration."""

    def __init__(self, own: Machine, source: DenoiserSource) -> None:
        super().__init__(source)
        self.own, self.times = own, []
        self.times: list[float]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.own.wait()
        began = time.perf_counter()
        super().training_step(batch, batch_idx)
        self.own.wait()
        self.times.append(time.perf_counter() - began)


def ffhq(own: Machine, batch: int) -> dict[str, Any]:
    """Iterations of the paper's FFHQ-256 run at its defaults, bf16; the heaviest model that it trains."""
    source = tiny_unet() if own.tiny else RandomWeights(ADMSource("none", ADMConfig.load("ffhq256")))
    precision = "bf16-mixed" if own.cuda else "32-true"
    predicted = predict_memory(UniDAD(source), batch, precision).peak / GIB
    plan = Plan(UniDAD(source), batch)
    side, count = (16, 12) if own.tiny else (256, ITERATIONS + WARM_UP)
    flops = statistics.mean(plan.flops(number) for number in range(5))  # r = 5: one of the student, four without
    module = Timed(own, source)
    own.peak()
    fit(module, count, Stream(random_images(10, side), batch_size=batch), accelerator=own.accelerator, devices=1,
        precision=precision)  # fmt: skip
    warm = WARM_UP if count > WARM_UP + 5 else count - 5
    seconds = statistics.mean(module.times[warm:])
    return {
        "ms_per_iteration": 1e3 * seconds, "peak_gib": own.peak(), "predicted_gib": predicted,
        "tflops_per_iteration": flops / TERA, "tflops_per_second": flops / TERA / seconds,
        "slowest_kernels": kernels(own, module, batch, side),
    }  # fmt: skip


def kernels(own: Machine, module: UniDAD, batch: int, side: int) -> list[dict[str, Any]]:
    """The ten kernels that took longest in five more iterations."""
    from torch.profiler import ProfilerActivity, profile

    wanted = ProfilerActivity.CUDA if own.cuda else ProfilerActivity.CPU
    with profile(activities=[wanted]) as seen:
        fit(module, 5, Stream(random_images(10, side), batch_size=batch), accelerator=own.accelerator, devices=1)
    spent = "device_time_total" if own.cuda else "cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, spent))[:10]
    return [{"name": e.key[:90], "calls": e.count, "ms": getattr(e, spent) / 1e3} for e in events]


def parts(own: Machine) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "matrix products, TFLOP/s", lambda: matrix_products(own)
    yield "quickstart", lambda: quickstart(own)
    for batch in SIZES[:1] if own.tiny else SIZES:
        yield f"FFHQ-256, batch {batch}", lambda batch=batch: ffhq(own, batch)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small numbers: tries the command, not the machine")
    given = parser.parse_args(args)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --device cpu --tiny tries the command without one")
    out, began = Path(given.out) / "gpu.json", time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    own, results, failed = Machine(given.device, given.tiny), {"machine": machine()}, 0
    for name, part in parts(own):
        if time.monotonic() - began > 60 * given.minutes:
            results[name] = {"left out": f"{given.minutes:g} minutes were over"}
        else:
            try:
                results[name] = part()
            except Exception:  # noqa: BLE001 (written down; the next part begins)
                results[name], failed = {"error": traceback.format_exc()[-3000:]}, failed + 1
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results[name])[:400], flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

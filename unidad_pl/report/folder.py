"""A run folder as data: whatever is missing or damaged is said and left out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unidad_pl.callbacks.cost import FILE as COST_FILE
from unidad_pl.callbacks.environment import FILE as ENVIRONMENT_FILE
from unidad_pl.callbacks.records import FILE as METRICS_FILE
from unidad_pl.callbacks.records import read_lines, read_records
from unidad_pl.files import BrokenFile, read_json
from unidad_pl.report.curves import Curve, Logged, read_logged
from unidad_pl.runs.config import CONFIG_FILE, EVENTS, read_config

MARKS = (CONFIG_FILE, METRICS_FILE, ENVIRONMENT_FILE, "checkpoints", "samples", "metrics.csv", f"{EVENTS}*")
"""What a run leaves: a folder with none of these is none."""
WHAT_IT_IS = (
    "a run folder is what 'unidad fit' writes and names at its end, runs/NAME/version_N with config.yaml, "
    "metrics.jsonl, checkpoints/ and samples/ in it; 'unidad fit --config configs/quickstart.yaml' makes one"
)
LOWER, HIGHER = "min", "max"
EVALUATED = ("val", "test", "epoch")


@dataclass
class Run:
    """What a run folder holds.

        >>> Run(Path("runs/quickstart/version_0"), "quickstart/version_0").iterations
        0

    Attributes:
        folder: where it is.
        name: what the page calls it.
        config: of config.yaml.
        logged: curves of its loggers.
        records: of metrics.jsonl, in order.
        starts: of environment.jsonl, in order.
        cost: of cost.json.
        checkpoints: file -> the iteration in its name, None where there is none in it.
        missing: what is not there, or cannot be read; a sentence each.
    """

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    logged: Logged = field(default_factory=Logged)
    records: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    checkpoints: dict[Path, int | None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def iterations(self) -> int:
        """The last one that anything was written of."""
        # Lightning logs a value of the n-th iteration at n - 1, and one of an evaluation after it at n.
        logged = [curve.steps[-1] + (not name.startswith(EVALUATED)) for name, curve in self.logged.curves.items()
                  if curve.steps]  # fmt: skip
        return max([0, *logged, *(record["step"] for record in self.records)])

    @property
    def max_steps(self) -> int | None:
        """Iterations that it was to train for, if its config says so."""
        value = self.option("trainer", "max_steps")
        return value if isinstance(value, int) and value > 0 else None

    @property
    def module(self) -> str:
        """The class of its module, without the package."""
        model = self.config.get("model")
        path = model.get("class_path") if isinstance(model, dict) else None
        return str(path).rpartition(".")[2] if path else ""

    def option(self, *names: str) -> Any:
        """An option of the config, None where it has none."""
        value: Any = self.config
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def metrics(self, stage: str = "val") -> dict[str, Curve]:
        """Metric -> its finite values over iterations; of several at one iteration the last."""
        found: dict[str, dict[int, float]] = {}
        for record in self.records:
            if record.get("stage") == stage:
                for name, value in record["values"].items():
                    if value is not None and math.isfinite(value):
                        found.setdefault(name, {})[record["step"]] = value
        return {name: Curve([*sorted(of)], [of[step] for step in sorted(of)]) for name, of in found.items()}

    def tflops(self) -> dict[int, float]:
        """Iteration -> TFLOPs that training had cost by then, where a ``Cost`` callback counted them."""
        return {record["step"]: float(record["tflops"]) for record in self.records
                if isinstance(record.get("tflops"), (int, float))}  # fmt: skip

    def best(self) -> tuple[str, int, float] | None:
        """(metric, iteration, value) of the best evaluation: by what the run's checkpoints monitor, else by ``fid``.
        One without a value that is finite is never the best."""
        metrics = self.metrics()
        name, mode = self.monitor()
        curve = metrics.get(name)
        if curve is None:
            return None
        better = min if mode == LOWER else max
        value, step = better(zip(curve.values, curve.steps, strict=True))
        return name, step, value

    def monitor(self) -> tuple[str, str]:
        """(metric, ``min`` or ``max``) by which the best evaluation is chosen."""
        callbacks = self.option("trainer", "callbacks")
        own = (
            [one.get("init_args") for one in callbacks if isinstance(one, dict)] if isinstance(callbacks, list) else []
        )
        for options in (self.option("checkpoint"), *own):
            if isinstance(options, dict) and isinstance(options.get("monitor"), str):
                mode = options.get("mode")
                return options["monitor"].removeprefix("val/"), mode if mode in (LOWER, HIGHER) else LOWER
        return "fid", LOWER

    def last_checkpoint(self) -> Path | None:
        """``last.ckpt``, or the file of the latest iteration."""
        order = sorted(self.checkpoints, key=lambda path: (path.name == "last.ckpt", self.checkpoints[path] or -1))
        return order[-1] if order else None


def is_run(folder: Path) -> bool:
    """Whether a run has written anything into ``folder``."""
    return folder.is_dir() and any(any(folder.glob(mark)) for mark in MARKS)


def read_run_folder(folder: Path) -> Run:
    """Read what is there.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is the folder of no run.
    """
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}: {WHAT_IT_IS}")
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file and no run folder: {WHAT_IT_IS}")
    if not is_run(folder):
        inner = sorted(path.parent for mark in MARKS[:3] for deep in ("*", "*/*")
                       for path in folder.glob(f"{deep}/{mark}"))  # fmt: skip
        instead = f"but {str(inner[0])!r} in it is one" if inner else f"and nothing in it is one: {WHAT_IT_IS}"
        raise ValueError(f"{str(folder)!r} is no run folder, {instead}")
    whole = folder.resolve()
    run = Run(folder, "/".join(whole.parts[-2:]) if whole.name.startswith("version_") else whole.name)
    run.config = _read(run, CONFIG_FILE, read_config, "so how its options differ from the defaults is not known") or {}
    run.records = (
        _read(run, METRICS_FILE, lambda path: read_records(path, run.missing), "so no evaluation is shown") or []
    )
    run.starts = _read(run, ENVIRONMENT_FILE, lambda path: read_lines(path, lambda _: None, run.missing),
                       "so versions and hardware are not known") or []  # fmt: skip
    run.cost = _read(run, COST_FILE, read_json, "which the callback Cost writes at the end of a run") or {}
    run.logged = read_logged(folder)
    run.missing += run.logged.problems
    if not run.logged.curves:
        run.missing.append("there are no TensorBoard events and no metrics.csv, so losses and gradients are not shown")
    for path in sorted((folder / "checkpoints").glob("*.ckpt")):
        step = re.search(r"step=(\d+)", path.name)
        run.checkpoints[path] = int(step.group(1)) if step else None
    if not run.checkpoints:
        run.missing.append("there are no checkpoints, so there is nothing to go on from, to draw with or to export")
    return run


def _read(run: Run, name: str, read: Callable[[Path], Any], otherwise: str) -> Any:
    path = run.folder / name
    if not path.is_file():
        run.missing.append(f"there is no {name}, {otherwise}")
        return None
    try:
        return read(path)
    except (BrokenFile, OSError, ValueError) as error:
        run.missing.append(f"{name} cannot be read: {error}")
        return None

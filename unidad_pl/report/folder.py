"""A run folder as data: whatever is missing or damaged is said and left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unidad_pl.callbacks.cost import FILE as COST_FILE
from unidad_pl.callbacks.environment import FILE as ENVIRONMENT_FILE
from unidad_pl.callbacks.records import FILE as METRICS_FILE
from unidad_pl.callbacks.records import read_records
from unidad_pl.files import BrokenFile, read_json
from unidad_pl.report.curves import Curve, Logged, read_logged
from unidad_pl.runs.config import CONFIG_FILE, read_config

MARKS = (CONFIG_FILE, METRICS_FILE, ENVIRONMENT_FILE, "checkpoints", "samples", "metrics.csv", "events.out.tfevents.*")
"""What a run leaves: a folder with none of these is none."""
LOWER, HIGHER = "min", "max"


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
        logged = [curve.steps[-1] + 1 for curve in self.logged.curves.values() if curve.steps]
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
        """Metric -> its values over iterations; of several at one iteration the last."""
        found: dict[str, dict[int, float]] = {}
        for record in self.records:
            if record.get("stage") == stage:
                for name, value in record["values"].items():
                    if value is not None:
                        found.setdefault(name, {})[record["step"]] = value
        return {name: Curve([*sorted(of)], [of[step] for step in sorted(of)]) for name, of in found.items()}

    def tflops(self) -> dict[int, float]:
        """Iteration -> TFLOPs that training had cost by then, where a ``Cost`` callback counted them."""
        return {record["step"]: float(record["tflops"]) for record in self.records
                if isinstance(record.get("tflops"), (int, float))}  # fmt: skip

    def best(self) -> tuple[str, int, float] | None:
        """(metric, iteration, value) of the best evaluation: by what the run's checkpoints monitor, else by ``fid``."""
        metrics = self.metrics()
        name, mode = self._monitor()
        curve = metrics.get(name)
        if curve is None:
            return None
        better = min if mode == LOWER else max
        value, step = better(zip(curve.values, curve.steps, strict=True))
        return name, step, value

    def _monitor(self) -> tuple[str, str]:
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
        raise FileNotFoundError(f"no folder {str(folder)!r}: give the one that unidad fit named, runs/NAME/version_N")
    if not is_run(folder):
        inner = (
            sorted(path.parent for mark in MARKS[:3] for path in folder.glob(f"*/{mark}")) if folder.is_dir() else []
        )
        instead = f"one in it is, such as {str(inner[0])!r}" if inner else "there is nothing in it that a run writes"
        raise ValueError(f"{str(folder)!r} is no run folder: {instead}")
    whole = folder.resolve()
    run = Run(folder, "/".join(whole.parts[-2:]) if whole.name.startswith("version_") else whole.name)
    run.config = _read(run, CONFIG_FILE, read_config, "how it differs from the defaults is not known") or {}
    run.records = [one for one in _lines(run, METRICS_FILE, "no evaluation is shown") if is_evaluation(one)]
    run.starts = _lines(run, ENVIRONMENT_FILE, "versions and hardware are not known")
    run.cost = _read(run, COST_FILE, read_json, "written at the end of a run with the callback Cost") or {}
    run.logged = read_logged(folder)
    run.missing += run.logged.problems
    if not run.logged.curves:
        run.missing.append("no TensorBoard events and no metrics.csv: losses and gradients are not shown")
    for path in sorted((folder / "checkpoints").glob("*.ckpt")):
        step = re.search(r"step=(\d+)", path.name)
        run.checkpoints[path] = int(step.group(1)) if step else None
    if not run.checkpoints:
        run.missing.append("no checkpoints: there is nothing to go on from, sample or export")
    return run


def _read(run: Run, name: str, read: Callable[[Path], Any], otherwise: str) -> Any:
    path = run.folder / name
    if not path.is_file():
        run.missing.append(f"no {name}: {otherwise}")
        return None
    try:
        return read(path)
    except (BrokenFile, OSError, ValueError) as error:
        run.missing.append(f"{name} cannot be read: {error}")
        return None


def _lines(run: Run, name: str, otherwise: str) -> list[dict[str, Any]]:
    return _read(run, name, read_records, otherwise) or []


def is_evaluation(record: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is one that an evaluation callback may have written.

    >>> is_evaluation({"values": {"fid": "low"}, "step": 3})
    False
    """
    values, step = record.get("values"), record.get("step")
    plain = isinstance(values, dict) and all(isinstance(v, (int, float, type(None))) for v in values.values())
    return plain and isinstance(step, int) and isinstance(record.get("stage"), str)

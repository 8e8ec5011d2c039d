"""What the loggers of a run wrote: TensorBoard's event files, or metrics.csv."""

from __future__ import annotations

import csv
import logging
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from unidad_pl.runs.config import EVENTS


@dataclass
class Curve:
    """A logged value over iterations.

    >>> Curve([0, 1], [0.5, 0.25]).values[-1]
    0.25
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def then(self, other: Curve) -> Curve:
        """This one up to where ``other``, of a run that was resumed, begins; then that."""
        kept = [i for i, step in enumerate(self.steps) if step < min(other.steps, default=math.inf)]
        return Curve([*(self.steps[i] for i in kept), *other.steps], [*(self.values[i] for i in kept), *other.values])

    def thinned(self, most: int) -> Curve:
        """About ``most`` points at most: the smallest and the largest of each stretch, so that no peak is lost.

        NaN and infinities are neither; a stretch of nothing else keeps one of them, which is a gap in the line.

        >>> Curve(list(range(6)), [0, 9, math.nan, 2, -5, 3]).thinned(4).values
        [0, 9, -5, 3]
        """
        count = len(self.steps)
        if count <= most:
            return self
        bounds = [round(i * count / max(1, most // 2)) for i in range(max(1, most // 2) + 1)]
        kept: list[int] = []
        for start, end in pairwise(bounds):
            finite = [i for i in range(start, end) if math.isfinite(self.values[i])] or [start]
            kept += sorted({min(finite, key=self.values.__getitem__), max(finite, key=self.values.__getitem__)})
        return Curve([self.steps[i] for i in kept], [self.values[i] for i in kept])


@dataclass
class Logged:
    """What was found.

    >>> Logged().seconds
    0.0

    Attributes:
        curves: name -> values.
        seconds: from the first value to the last, all starts of the run together; 0 where the files have no times.
        problems: files that could not be read, a sentence each.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def add(self, curves: dict[str, Curve]) -> None:
        """What a later start of the run wrote."""
        for name, curve in curves.items():
            self.curves[name] = self.curves.get(name, Curve()).then(curve)


def read_logged(folder: Path) -> Logged:
    """All scalars below a run folder, in the order the files were begun."""
    logged = Logged()
    for path in sorted(folder.rglob(f"{EVENTS}*"), key=lambda path: path.name):
        if not path.is_file():  # a pipe would be waited for
            logged.problems.append(f"{path.name} is no file")
            continue
        try:
            curves, seconds = _events(path)
        except Exception as error:  # noqa: BLE001 (a damaged file fails anywhere within tensorboard)
            logged.problems.append(f"{path.name} cannot be read ({type(error).__name__}: {error})")
            continue
        logged.add(curves)
        logged.seconds += seconds
    table = folder / "metrics.csv"
    if not logged.curves and table.is_file():
        try:
            logged.add(_csv(table))
        except (OSError, ValueError, OverflowError, csv.Error) as error:
            logged.problems.append(f"metrics.csv cannot be read ({error})")
    return logged


def _events(path: Path) -> tuple[dict[str, Curve], float]:
    """The scalars of one file, and the seconds between its first and last. What a killed run left half is left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    names = ("images", "audio", "histograms", "compressedHistograms", "tensors")
    found: Any = EventAccumulator(str(path), size_guidance={"scalars": 0, **dict.fromkeys(names, 1)})
    found.Reload()
    curves: dict[str, Curve] = {}
    times: list[float] = []
    for name in found.Tags()["scalars"]:
        events = found.Scalars(name)
        curves[name] = Curve([int(one.step) for one in events], [float(one.value) for one in events])
        times += [one.wall_time for one in events]
    return curves, max(times) - min(times) if times else 0.0


def _csv(path: Path) -> dict[str, Curve]:
    """The columns of Lightning's CSV logger."""
    curves: dict[str, Curve] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            step = row.pop("step", None)
            for name, value in row.items():
                if step and value and isinstance(value, str) and name:
                    curve = curves.setdefault(name, Curve())
                    curve.steps.append(int(float(step)))
                    curve.values.append(float(value))
    return curves

"""The files of a recording (see :mod:`tests.replay`): reading them, comparing with them, and a table of the result."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLES = ("karras_sigmas", "alphas_cumprod", "temb")


class RecordingError(ValueError):
    """The recording or the checkpoint cannot be replayed: a file or a needed key is missing, or does not fit."""


@dataclass(frozen=True)
class Comparison:
    """One recorded number or tensor against ours."""

    key: str
    error: float
    """Relative error (L2 for tensors); infinite where shapes differ."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.tolerance


def load(path: Path) -> dict[str, Any]:
    """A flat dict written by ``torch.save``.

    Raises:
        RecordingError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise RecordingError(f"the recording has no {path.name} (looked in {path.parent})")
    try:
        content = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise RecordingError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecordingError(f"{path} must hold one flat dict of names, got a {type(content).__name__}")
    return content


@dataclass
class Recording:
    """One file: gives out inputs, compares results, and remembers which of its keys were used."""

    path: Path
    dtype: torch.dtype
    values: dict[str, Any] = field(init=False)
    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.values = load(self.path)

    def holds(self, *patterns: str) -> bool:
        """Whether any key matches any of the patterns (``f32rel.*`` aside)."""
        return any(fnmatch(key, p) for key in self.values if not key.startswith(("f32rel.", "cfg.")) for p in patterns)

    def value(self, key: str, kind: type | tuple[type, ...] = Tensor) -> Any:
        """What ``key`` holds, marked as used.

        Raises:
            RecordingError: no such key, or not of type ``kind``.
        """
        if key not in self.values:
            raise RecordingError(f"{self.path} lacks {key!r}, which this turn needs")
        if not isinstance(self.values[key], kind):
            raise RecordingError(f"{self.path}: {key!r} is a {type(self.values[key]).__name__}, expected {kind}")
        self.used.add(key)
        return self.values[key]

    def images(self, key: str, shape: Sequence[int]) -> Tensor:
        """An input of that shape, in the dtype of the replay."""
        value = self.value(key)
        if tuple(value.shape) != tuple(shape):
            raise RecordingError(f"{self.path}: {key!r} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        return value.to(self.dtype)

    def compare_all(self, prefix: str, **ours: Tensor | float) -> None:
        """Compare every one with the key ``PREFIX + NAME``."""
        for name, result in ours.items():
            self.compare(prefix + name, result)

    def compare(self, key: str, ours: Any, total: float | None = None, each: bool = False) -> None:
        """Compare with ``key``; a key that is not there is a problem.

        Args:
            key: what the recording calls it.
            ours: our result: a tensor, a number or a list of names.
            total: norm of the whole gradient this is a part of. Some parts are zero but for rounding, so the
                difference of a part is not divided by less than a fixed share of ``total`` (float64: a thousandth;
                float32: all of it where the part itself is below a millionth).
            each: in float64, compare every entry by itself instead of all of them together.
        """
        if key not in self.values:
            self.problems.append(f"{self.path.name} lacks {key!r}")
            return
        if isinstance(ours, list):
            self.comparisons.append(Comparison(key, float(len(set(self.value(key, list)) ^ set(ours))), 0.0))
            return
        seen = self.value(key, (Tensor, float, int))
        theirs = seen if isinstance(seen, Tensor) else torch.tensor(seen, dtype=torch.float64)
        ours = torch.as_tensor(ours).detach()
        exact = not theirs.is_floating_point()
        if theirs.shape != ours.shape:
            self.problems.append(f"{self.path.name}: {key!r} has shape {tuple(theirs.shape)}, ours {tuple(ours.shape)}")
            error = math.inf
        elif exact:
            error = float((theirs != ours).sum())
        else:
            error = self._relative(ours.double(), theirs.double(), total, each)
        self.comparisons.append(Comparison(key, error, 0.0 if exact else self.tolerance(key)))

    def _relative(self, ours: Tensor, theirs: Tensor, total: float | None, each: bool) -> float:
        double = self.dtype == torch.float64
        part = (lambda t: t.abs()) if each and double else (lambda t: t.norm())
        difference, scale = part(ours - theirs), part(theirs)
        if total is not None:
            floor = scale.clamp_min(1e-3 * total)
            scale = floor if double else torch.where(scale < 1e-6 * total, torch.full_like(scale, total), scale)
        # an exact zero is divided by nothing: the error is then the absolute one
        error = difference / torch.where(scale == 0, torch.ones_like(scale), scale)
        return float(error.max()) if error.numel() else 0.0

    def tolerance(self, key: str) -> float:
        """float64: 1e-9. float32: ten times the recorded error of the authors' own float32 run, plus 1e-6."""
        if self.dtype == torch.float64:
            return 1e-9
        recorded = self.values.get(f"f32rel.{key}")
        return 10 * recorded + 1e-6 if isinstance(recorded, float) and math.isfinite(recorded) else 1e-4

    def finish(self) -> None:
        """Report keys that nothing used, and tolerances of keys that are not there."""
        for key in self.values:
            name = key.removeprefix("f32rel.")
            if name != key and name not in self.values:
                self.problems.append(f"{self.path.name} has a tolerance {key!r} but lacks {name!r}")
            if name == key and key not in self.used and not isinstance(self.values[key], str):
                self.problems.append(f"{self.path.name} holds {key!r}, which is unknown or belongs to no turn of it")


def group_of(key: str) -> str:
    """``iteration_gen/dmd.source_x0`` -> ``iteration_gen/dmd``; scalars are one group."""
    name, _, rest = key.partition("/")
    first, _, more = rest.partition(".")
    if not more:
        return f"{name}/" + ("losses" if "loss" in rest else "tables" if rest in TABLES else rest)
    return f"{name}/{first}" + (f".{more.partition('.')[0]}" if first == "grad" else "")


def table(comparisons: Sequence[Comparison]) -> list[str]:
    """Lines of a table: the worst key of each group, judged by error over tolerance."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(group_of(comparison.key), []).append(comparison)
    lines = [f"{'group':<34}{'keys':>5}  {'worst error':>11}  {'tolerance':>9}       worst key"]
    for group, members in groups.items():
        worst = max(members, key=lambda c: (not c.passed, c.error / c.tolerance if c.tolerance else c.error))
        verdict, key = "ok  " if all(c.passed for c in members) else "FAIL", worst.key.partition("/")[2]
        figures = f"{len(members):>5}  {worst.error:>11.2e}  {worst.tolerance:>9.1e}"
        lines.append(f"{group:<34}{figures}  {verdict} {key}")
    return lines

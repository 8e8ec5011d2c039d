"""The options a module was made with, as plain data in its checkpoints: a resumed run may not change the method."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from unidad_pl.arguments import ABSENT, class_path, differences
from unidad_pl.checks import check_at_least, check_options, check_whole
from unidad_pl.seeds import MOST_SEED

LARGEST_DECAY, MOST_PARTS = 0.999999, 100_000


@dataclass
class TrainingOptions:
    """How a run goes, whatever it trains.

        >>> TrainingOptions(ema_decay=1.0)
        Traceback (most recent call last):
        ...
        ValueError: ema_decay must be in [0, 0.999999], got 1.0

    Attributes:
        seed: seed of every random draw in training and of the initialisation of new layers; null: 0, or the command
            line's ``seed_everything``.
        accumulate: micro-batches an iteration's batch is split into; gradients are averaged over them.
        ema_decay: decay of the exponential moving average of the sampled network, one update per step of it; early
            on the decay is ``(1 + n) / (10 + n)``. 0: no average.
        max_skipped: iterations in a row with a non-finite loss or gradient after which the run ends with an error.
        classes: class labels to use of a class-conditional model; null: all of them.
    """

    seed: int | None = None
    accumulate: int = 1
    ema_decay: float = 0.0
    max_skipped: int = 10
    classes: list[int] | None = None

    def __post_init__(self) -> None:
        check_options(self)
        check_whole(0, MOST_SEED, null=True, seed=self.seed)
        check_whole(1, MOST_PARTS, accumulate=self.accumulate)
        check_whole(1, max_skipped=self.max_skipped)
        check_at_least(0, LARGEST_DECAY, ema_decay=self.ema_decay)
        for label in self.classes or ():
            check_whole(0, classes=label)


def complete(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module that was saved, if they are all there.

    Raises:
        ValueError: one is missing, as an object that no file can hold.
    """
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is parameter.empty and name not in given:
            raise ValueError(
                f"the checkpoint cannot hold the argument {name!r} of {kind.__name__}, an object of your own: give it, "
                f"{kind.__name__}.load_from_checkpoint(path, {name}=...)"
            )
    return given


def flatten(value: Any, name: str = "", inside: bool = False) -> list[tuple[str, Any]]:
    """(dotted name, plain value) of everything in ``value``; an object appears as its class and its attributes.

    >>> flatten({"student": {"num_steps": 3}, "range": (0.02, 0.98)})
    [('student.num_steps', 3), ('range', [0.02, 0.98])]
    """
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, Mapping):
        parts = {str(key): item for key, item in value.items()}
    elif isinstance(value, (bool, int, float, str)) or value is None:
        return [(name, value)]
    elif isinstance(value, (list, tuple)):
        plain = [dict(flatten(item, "", inside)) for item in value]
        return [(name, [item.get("", item) for item in plain])]
    else:
        kind = [(name, class_path(type(value)))]
        attributes = {} if inside or isinstance(value, nn.Module) else getattr(value, "__dict__", {})
        # A string in a source is a place, or the name of one: what is found there is what counts.
        public = {k: v for k, v in attributes.items() if not k.startswith("_") and not isinstance(v, str)}
        return kind + [pair for k, v in public.items() for pair in flatten(v, f"{name}.{k}", True)]
    return [pair for k, v in parts.items() for pair in flatten(v, f"{name}.{k}" if name else k, inside)]


def defaults(given: Mapping[str, Any], constructor: Any) -> dict[str, Any]:
    """Dotted name -> plain default of the arguments ``given`` to ``constructor`` and of the options inside them."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        found |= _inner_defaults(value, name)
    for parameter in inspect.signature(constructor).parameters.values():
        if parameter.default is not parameter.empty:
            found |= flatten(parameter.default, parameter.name)
    return found


def _inner_defaults(value: Any, name: str) -> dict[str, Any]:
    if not is_dataclass(value) or isinstance(value, type):
        return {}
    found: dict[str, Any] = {}
    for field in fields(value):
        found |= _inner_defaults(getattr(value, field.name), f"{name}.{field.name}")
        if field.default is not MISSING:
            found |= flatten(field.default, f"{name}.{field.name}")
        elif field.default_factory is not MISSING:
            found |= flatten(field.default_factory(), f"{name}.{field.name}")
    return found


def log_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say which options a run is resumed with that are not those of its checkpoint."""
    for name, (old, new) in differences(before, now).items():
        rank_zero_info(f"Resuming with {name} {new!r}; the checkpoint was written with {old!r}")


def refuse_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str], standard: Mapping[str, Any]
) -> None:
    """Compare the options of a checkpoint with those of the run that resumes it; changes of free ones are logged.

    Args:
        before: the checkpoint's. Options that are younger than it are not in it: they may have their default.
        now: the run's.
        free: options, or groups of them, that shape nothing that is computed.
        standard: the default of every option.

    Raises:
        RuntimeError: another one differs; names both values.
    """
    young = {
        name: value
        for name, value in now.items()
        if value == standard.get(name, ABSENT) and not {name, name.rpartition(".")[0]} & set(before)
    }
    changed = differences({**young, **before}, now)
    allowed = {name for name in changed if any(name == one or name.startswith(f"{one}.") for one in free)}
    log_changes(*({name: side.get(name, ABSENT) for name in allowed} for side in (before, now)))
    refused = [f"{name} was {old!r} and is now {new!r}" for name, (old, new) in changed.items() if name not in allowed]
    if refused:
        raise RuntimeError(
            f"the checkpoint was trained with other options: {'; '.join(refused)}. Resume with the config the run "
            f"started with (config.yaml in its folder), or begin a new run without ckpt_path"
        )

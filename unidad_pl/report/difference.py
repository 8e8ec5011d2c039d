"""How a run's config differs from the defaults. A class that a config names is looked up among ours, never imported."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

from unidad_pl.arguments import ARGUMENTS, CLASS
from unidad_pl.runs.config import LOGGER

REQUIRED = "(required)"
OWN_COMMAND = {"summary": True, "threads": None, "predictions_folder": None, "seed_everything": 0, "ckpt_path": None,
               "weights_only": None}  # fmt: skip
"""Options of ``unidad fit`` beside those of classes."""

LOGGED_TO = ("trainer.logger.save_dir", "trainer.logger.name", "trainer.logger.version")

Rows = dict[str, tuple[Any, Any]]
Slots = dict[str, tuple[Any, type | None]]


def differences_from_defaults(config: Mapping[str, Any], standard: Mapping[str, Any]) -> Rows:
    """Dotted option -> (value, default) where they differ; an option without a default is :data:`REQUIRED`.

    >>> differences_from_defaults({"threads": 2, "summary": True}, {})
    {'threads': (2, None)}

    Args:
        config: of config.yaml, which holds all options.
        standard: dotted option -> default, where it is another than that of the class.
    """
    import lightning.pytorch as pl

    from unidad_pl.callbacks.sound_checkpoint import SoundCheckpoint

    rows: Rows = {}
    for name, value in config.items():
        kinds: dict[str, type] = {"trainer": pl.Trainer, "checkpoint": SoundCheckpoint}
        if name in kinds and isinstance(value, dict):
            _compare_slots(rows, name, value, slots(kinds[name]))
        else:
            _compare(rows, name, value, OWN_COMMAND.get(name, REQUIRED), None)
    for name, default in standard.items():
        if name in rows:
            rows[name] = (rows[name][0], default)
    if _path(LOGGER) == _path(
        config.get("trainer", {}).get("logger") if isinstance(config.get("trainer"), dict) else {}
    ):
        for name in [name for name in rows if name.startswith("trainer.logger")]:
            if name not in LOGGED_TO:  # its other options are those of the SummaryWriter behind it
                del rows[name]
    return {name: pair for name, pair in rows.items() if _plain(pair[0]) != _plain(pair[1])}


def known_class(path: Any) -> type | None:
    """The class that a config calls ``path``, if it is one of the package's public names, or one of Lightning's loggers
    and callbacks."""
    import lightning.pytorch as pl

    import unidad_pl

    package, _, name = str(path).rpartition(".")
    homes = {"lightning.pytorch.loggers": pl.loggers, "lightning.pytorch.callbacks": pl.callbacks}
    found: Any = None
    if package.partition(".")[0] == "unidad_pl" and name in unidad_pl.__all__:
        found = getattr(unidad_pl, name)
    elif package in homes:
        found = getattr(homes[package], name, None)
    return found if isinstance(found, type) else None


@cache
def slots(kind: type) -> Slots:
    """Argument -> its default, and the dataclass that it holds if it is a group of options."""
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {one.name: (_default(one), _group(hints.get(one.name))) for one in fields(kind)}
    found: Slots = {}
    for owner in kind.__mro__:
        constructor = owner.__dict__.get("__init__")
        if constructor is None:
            continue
        parameters = inspect.signature(constructor).parameters.values()
        hints = _hints(constructor)
        for one in parameters:
            if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) and one.name != "self":
                default = REQUIRED if one.default is one.empty else one.default
                found.setdefault(one.name, (default, _group(hints.get(one.name))))
        if not any(one.kind == one.VAR_KEYWORD for one in parameters):
            break
    return found


def _hints(constructor: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(constructor)
    except (NameError, TypeError):  # names that are imported for type checkers only
        return {}


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else REQUIRED


def _group(hint: Any) -> type | None:
    return next((one for one in (hint, *typing.get_args(hint)) if isinstance(one, type) and is_dataclass(one)), None)


def _compare(rows: Rows, name: str, value: Any, default: Any, group: type | None) -> None:
    if isinstance(value, dict) and CLASS in value:
        kind = known_class(value[CLASS])
        if _path(default) != value[CLASS]:
            rows[name] = (_short(value[CLASS]), default)
        _compare_slots(rows, name, value.get(ARGUMENTS) or {}, slots(kind) if kind else {})
    elif isinstance(value, dict) and group is not None:
        base = {one: (getattr(default, one), kind) for one, (_, kind) in slots(group).items()} if isinstance(
            default, group) else slots(group)  # fmt: skip
        if default is None:
            rows[name] = ("on", None)
        _compare_slots(rows, name, value, base)
    elif isinstance(value, list) and any(isinstance(one, dict) and CLASS in one for one in value):
        for one in value:
            inner = f"{name}.{_short(one.get(CLASS))}" if isinstance(one, dict) else name
            _compare(rows, inner, one, REQUIRED, None)
    elif _plain(value) != _plain(default):
        rows[name] = (value, default)


def _compare_slots(rows: Rows, name: str, values: Any, known: Slots) -> None:
    for option, value in values.items() if isinstance(values, dict) else ():
        default, group = known.get(option, (REQUIRED, None))
        _compare(rows, f"{name}.{option}", value, default, group)


def _path(default: Any) -> Any:
    return default.get(CLASS) if isinstance(default, dict) else None


def _short(path: Any) -> str:
    return str(path).rpartition(".")[2]


def _plain(value: Any) -> Any:
    """As YAML would hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return value


def as_text(value: Any) -> str:
    """A value as YAML writes it, in one line.

    >>> as_text([1, None]), as_text(True), as_text("a")
    ('[1, null]', 'true', 'a')
    """
    import yaml

    if value is REQUIRED:
        return REQUIRED
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()

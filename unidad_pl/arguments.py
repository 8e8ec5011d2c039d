"""The arguments that objects were made with, as plain data for a checkpoint, and the objects again from such data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from unidad_pl.checks import check_arguments

CLASS, ARGUMENTS = "class_path", "init_args"
ABSENT = "<not there>"


def given_arguments(constructor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value of all arguments of a call of ``constructor`` (an ``__init__``), defaults included.

    Raises:
        ValueError: see :func:`~unidad_pl.checks.check_arguments`.
    """
    bound = inspect.signature(constructor).bind_partial(None, *args, **kwargs)
    bound.apply_defaults()
    given = dict(list(bound.arguments.items())[1:])
    check_arguments(constructor, given)
    return given


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (value before, value now) where they differ; a name that only one side has is :data:`ABSENT` on the
    other."""
    names = sorted({*before, *now})
    pairs = {name: (before.get(name, ABSENT), now.get(name, ABSENT)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe(value: Any) -> Any:
    """``value`` as plain data; a dataclass, or an object that keeps its arguments, as its class and its arguments.

        >>> describe({"sizes": (1, 2)})
        {'sizes': (1, 2)}

    Arguments of an object that are neither are left out.

    Raises:
        TypeError: ``value`` is neither; names its class.
    """
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return type(value)([describe(item) for item in value])
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    given: dict[str, Any] | None = getattr(value, "_given", None)
    if is_dataclass(value):
        given = {field.name: getattr(value, field.name) for field in fields(value)}
    if given is None:
        raise TypeError(f"a {type(value).__name__} cannot be described in a file")
    arguments = {}
    for name, argument in given.items():
        with suppress(TypeError):
            arguments[name] = describe(argument)
    return {CLASS: class_path(type(value)), ARGUMENTS: arguments}


def rebuild(value: Any, known: Mapping[str, Callable[..., Any]]) -> Any:
    """What :func:`describe` described. Nothing is imported: a class is one of ``known``.

    Raises:
        ValueError: it names another class, or gives it no mapping of arguments.
    """
    if isinstance(value, (list, tuple)):
        return type(value)([rebuild(item, known) for item in value])
    if not isinstance(value, dict):
        return value
    if set(value) != {CLASS, ARGUMENTS}:
        return {key: rebuild(item, known) for key, item in value.items()}
    if not isinstance(value[CLASS], str) or value[CLASS] not in known:
        raise ValueError(f"{value[CLASS]!r} is no class that this program has imported: import its module first")
    if not isinstance(value[ARGUMENTS], dict):
        raise ValueError(f"{ARGUMENTS} of {value[CLASS]} must be a mapping, got {value[ARGUMENTS]!r:.80}")
    return known[value[CLASS]](**{name: rebuild(item, known) for name, item in value[ARGUMENTS].items()})


def known_classes(*roots: type) -> dict[str, type]:
    """Path -> class, of all imported subclasses of ``roots`` and the dataclasses that their constructors take."""
    found: dict[str, type] = {}
    waiting = list(roots)
    while waiting:
        kind = waiting.pop()
        if class_path(kind) not in found:
            found[class_path(kind)] = kind
            waiting += [*type.__subclasses__(kind), *_options_of(kind)]
    return found


def class_path(kind: type) -> str:
    """Module and name of a class, as configs give it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _options_of(kind: type) -> Iterator[type]:
    """The dataclasses among the types of a constructor's arguments."""
    hints: list[Any] = []
    with suppress(NameError):  # of a class whose annotations name what only a type checker imports
        hints = list(get_type_hints(kind.__init__).values())  # type: ignore[misc]
    while hints:
        hint = hints.pop()
        hints += get_args(hint)
        if isinstance(hint, type) and is_dataclass(hint):
            yield hint

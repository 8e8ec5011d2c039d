"""Refusals of wrong values, each naming the option, the value seen and what it may be."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from os import PathLike
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def check_choices(**choices: tuple[object, Any]) -> None:
    """Refuse unknown values by name.

        >>> check_choices(loss=("bce", Literal["bce", "hinge"]))
        >>> check_choices(loss=("mse", Literal["bce", "hinge"]))
        Traceback (most recent call last):
        ...
        ValueError: loss must be one of bce, hinge, got 'mse'

    Args:
        choices: option -> its value, and the ``Literal`` of the values it may have.

    Raises:
        ValueError: the first value that is not among its choices.
    """
    for name, (value, literal) in choices.items():
        if value not in get_args(literal):
            raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(literal)))}, got {value!r}")


def check_options(options: Any) -> None:
    """Refuse a dataclass with a field that holds something else than its annotation says.

    Looked at are numbers, which must be finite, truth values, texts, ``Literal`` choices, other dataclasses, and lists
    and tuples of these; each may be None only where the annotation says so. Anything else is left alone.

    Raises:
        ValueError: names the field.
    """
    hints = get_type_hints(type(options))
    for field in fields(options):
        _check_kind(field.name, getattr(options, field.name), hints[field.name])


def check_arguments(constructor: Any, given: Mapping[str, Any]) -> None:
    """Refuse truth values and groups of options that are something else than a constructor's annotations say.

        >>> def construct(shuffle: bool = True) -> None: ...
        >>> check_arguments(construct, {"shuffle": "no"})
        Traceback (most recent call last):
        ...
        ValueError: shuffle must be true or false, got 'no'

    Args:
        constructor: an ``__init__``.
        given: its arguments by name; other names are left alone.

    Raises:
        ValueError: names the argument.
    """
    with suppress(NameError):  # of a class whose annotations name what only a type checker imports
        for name, hint in get_type_hints(constructor).items():
            kinds = {*(get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))} - {NoneType}
            if name in given and all(kind is bool or is_dataclass(kind) for kind in kinds):
                _check_kind(name, given[name], hint)


def _check_kind(name: str, value: Any, hint: Any) -> None:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if len(kinds) - (NoneType in kinds) != 1 or (value is None and NoneType in kinds):
        return
    kind = next(one for one in kinds if one is not NoneType)
    if get_origin(kind) is Literal:
        check_choices(**{name: (value, kind)})
    elif get_origin(kind) in (list, tuple):
        _check_entries(name, value, get_args(kind))
    elif kind in WORDS or is_dataclass(kind):
        check_given(**{name: value})
        number = kind in (int, float)
        right = _is_finite(value) and isinstance(value, (int, kind)) if number else isinstance(value, kind)
        if not right:
            raise ValueError(f"{name} must be {WORDS.get(kind, f'a {kind.__name__}')}, got {value!r}")


def _check_entries(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    size = None if len(kinds) == 1 or kinds[-1] is Ellipsis else len(kinds)
    if not isinstance(value, (list, tuple)) or size not in (None, len(value)):
        raise ValueError(f"{name} must be a list{f' of {size}' if size else ''}, got {value!r}")
    for place, entry in enumerate(value):
        _check_kind(f"{name}[{place}]", entry, kinds[place if size else 0])


def check_at_least(least: float, most: float = math.inf, **values: float | None) -> None:
    """Refuse what is no finite number from ``least`` to ``most``; None is left alone.

        >>> check_at_least(0, 1, share=0.5, decay=float("nan"))
        Traceback (most recent call last):
        ...
        ValueError: decay must be in [0, 1], got nan

    Raises:
        ValueError: names the first of them.
    """
    for name, value in values.items():
        if value is not None and not (_is_finite(value) and least <= value <= most):
            limits = f"at least {least}" if most == math.inf else f"in [{least}, {most}]"
            raise ValueError(f"{name} must be {limits}, got {value!r}")


def check_positive(most: float = math.inf, /, **values: float | None) -> None:
    """Refuse what is no finite number above 0 and up to ``most``; None is left alone.

    Raises:
        ValueError: names the first of them.
    """
    for name, value in values.items():
        if value is not None and not (_is_finite(value) and 0 < value <= most):
            limit = "" if most == math.inf else f" and at most {most}"
            raise ValueError(f"{name} must be above 0{limit}, got {value!r}")


def check_whole(least: int, most: int = 2**31 - 1, *, null: bool = False, **values: object) -> None:
    """Refuse what is no whole number from ``least`` to ``most``; None is left alone if it may be ``null``.

        >>> check_whole(1, batch_size=2.5)
        Traceback (most recent call last):
        ...
        ValueError: batch_size must be a whole number of at least 1, got 2.5

    Raises:
        ValueError: names the first of them.
    """
    for name, value in values.items():
        if value is None and null:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            limits = f"of at least {least}" if most == 2**31 - 1 else f"in [{least}, {most}]"
            raise ValueError(f"{name} must be a whole number {limits}, got {value!r}")


def check_given(**values: object) -> None:
    """Refuse None.

    Raises:
        ValueError: names the first that is None.
    """
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name} must be given, got null")


def check_path(**values: object) -> None:
    """Refuse what is no path as text or ``pathlib.Path``; None is left alone.

    Raises:
        ValueError: names the first of them.
    """
    for name, value in values.items():
        if value is not None and not (isinstance(value, (str, PathLike)) and str(value)):
            raise ValueError(f"{name} must be a path, got {value!r}")
        if str(value).encode(errors="surrogateescape").decode(errors="replace") != str(value):
            raise ValueError(f"{name} {value!r} has a name that is no UTF-8, which no config can hold: rename it")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

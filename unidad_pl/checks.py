"""Refusals of wrong values, each naming the option, the value seen and what it may be."""

from __future__ import annotations

import math
from dataclasses import fields
from os import PathLike
from typing import Any, Literal, get_args, get_origin, get_type_hints


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
    """Refuse a dataclass with a field annotated as ``Literal`` that holds another value.

    Raises:
        ValueError: names the field.
    """
    hints = get_type_hints(type(options))
    literals = {f.name: hints[f.name] for f in fields(options) if get_origin(hints[f.name]) is Literal}
    check_choices(**{name: (getattr(options, name), literal) for name, literal in literals.items()})


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


def check_positive(**values: float | None) -> None:
    """Refuse what is no finite number above 0; None is left alone.

    Raises:
        ValueError: names the first of them.
    """
    for name, value in values.items():
        if value is not None and not (_is_finite(value) and value > 0):
            raise ValueError(f"{name} must be above 0, got {value!r}")


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


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

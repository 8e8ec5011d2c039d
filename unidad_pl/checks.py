"""Refusals of wrong values, each naming the option, the value seen and what it may be."""

from __future__ import annotations

from dataclasses import fields
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


def check_at_least(least: float, **values: float | None) -> None:
    """Refuse numbers below ``least``; None is left alone.

    Raises:
        ValueError: names the first of them.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")

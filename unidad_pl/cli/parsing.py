"""How ``unidad`` reads configs, environment variables and the command line: nothing guessed, nothing inherited."""

from __future__ import annotations

from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    Namespace,
    _typehints,
    get_loader,
    set_loader,
)
from lightning.pytorch.cli import LightningArgumentParser

from unidad_pl.cli.errors import StrictParser
from unidad_pl.cli.help import PlainFormatter
from unidad_pl.runs.config import read_config


class HelpFormatter(PlainFormatter, RawDescriptionHelpFormatter):
    """Keeps the description's example commands one per line."""


class ConfigFile(ActionConfigFile):
    """``--config FILE``: a file that cannot be read, or is no mapping, ends the command with a sentence."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if Path(values).is_file():
            read_config(values)
        super().__call__(parser, cfg, values, option_string)


class Parser(StrictParser, LightningArgumentParser):
    """Explains groups of options that may be null as it explains the others, where jsonargparse shows one line."""

    _inner_parser = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": PlainFormatter, **kwargs})

    def format_help(self, *args: Any) -> str:
        """The help of a class, its optional groups one after the other at its end."""
        text = super().format_help(*args)
        for action in self._actions if self._inner_parser else ():  # of a class
            kinds = () if action.dest.endswith(".help") else get_args(getattr(action, "_typehint", None))
            for kind in filter(is_dataclass, kinds):
                group = Parser(usage=SUPPRESS, add_help=False, description=f"{action.dest}, unless it is null:")
                group.add_class_arguments(kind, action.dest)
                group._inner_parser = True
                text += f"\n{group.format_help()}"
        return text


def read_nested_nulls() -> None:
    """``--model.target_teacher.adaptation null``: jsonargparse hands null on to nested options as the word None."""
    load = get_loader("yaml")
    set_loader("yaml", lambda text: None if text == "None" else load(text), exceptions=(yaml.YAMLError,))


@contextmanager
def later_values_replace() -> Iterator[None]:
    """A later list replaces an earlier one, and a later class takes no arguments of an earlier one.

    jsonargparse merges lists of the same length entry by entry, and keeps the arguments that both classes have: a
    checkpoint callback would inherit another one's options, a WandbLogger the name of a TensorBoardLogger. It has no
    setting for either, so that two functions of it are replaced as long as the block lasts.
    """
    library: Any = _typehints
    check, discard = library.ActionTypeHint._check_type, library.discard_init_args_on_class_path_change

    @wraps(check)
    def check_alone(self: Any, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:
        part = append or isinstance(value, library.NestedArg)
        merged = not part and cfg and isinstance(cfg.get(self.dest), list)
        return check(self, value, append, None if merged else cfg, mode)

    def discard_all(parser: Any, before: Any, value: Any) -> None:
        if before and "init_args" in before and before["class_path"] != value["class_path"]:
            before["init_args"] = Namespace()

    library.ActionTypeHint._check_type = check_alone
    library.discard_init_args_on_class_path_change = discard_all
    try:
        yield
    finally:
        library.ActionTypeHint._check_type = check
        library.discard_init_args_on_class_path_change = discard

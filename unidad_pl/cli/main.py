"""`unidad`: fit, validate, test and predict from YAML configs and command-line options (LightningCLI), and tools.

unidad fit --config configs/quickstart.yaml
unidad test --config runs/quickstart/version_0/config.yaml --ckpt_path runs/quickstart/version_0/checkpoints/last.ckpt
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from difflib import get_close_matches
from inspect import signature
from itertools import pairwise
from os import listdir
from os.path import basename, dirname, exists, isdir, join, splitext
from typing import TYPE_CHECKING

from unidad_pl.cli.description import DESCRIPTION
from unidad_pl.cli.errors import StrictParser, refuse, sentence_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

STAGES = ("fit", "validate", "test", "predict")
"""Lightning's commands."""
TOOLS = {
    "import adm": "unidad_pl.backbones.adm_files:import_adm",
    "restore adm": "unidad_pl.backbones.adm_files:restore_adm",
    "export": "unidad_pl.export.student:export_student",
    "sample": "unidad_pl.cli.sample:sample",
    "demo": "unidad_pl.cli.demo:demo",
    "study": "unidad_pl.cli.study:study",
    "report": "unidad_pl.report.page:report",
    "report memory": "unidad_pl.cli.report_memory:report_memory",
    "report subjects": "unidad_pl.cli.report_subjects:report_subjects",
}
"""Commands beside those: words on the command line -> module:function, whose arguments are the options."""


def processor_ticks() -> tuple[int, int]:
    """Ticks that all processors together have spent so far: working, and in all (Linux; OSError elsewhere)."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # the fourth and the fifth are idle, and idle for a disk


def wait_passively_where_busy() -> None:
    """Where other processes keep the cores busy, OpenMP's threads shall sleep and not spin while they wait.

    Spinning threads keep each other from running: beside three busy processes on two cores an iteration of the
    quickstart took longer than 6 s, asleep 2.4 s. Where the cores are free, spinning is a third faster. So this looks
    for a twentieth of a second, in which this process sleeps, whether the others work on more than half of the cores;
    the system's load average would still count an installation that has just ended. It counts only before torch is
    loaded; a policy that is set stays.
    """
    with suppress(OSError, ValueError):  # not every system tells
        worked, passed = processor_ticks()
        time.sleep(0.05)
        worked_now, passed_now = processor_ticks()
        if worked_now - worked > (passed_now - passed) / 2:
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the ``unidad`` command; ``args`` default to the command line's.

    Raises:
        Refused: the command ends with one sentence on stderr, and the code 1, or 2 for a wrong command line.
    """
    given = list(sys.argv[1:] if args is None else args)
    if given in ([], ["-h"], ["--help"]):  # answered before torch is imported
        sys.stdout.write(f"usage: unidad COMMAND [options]\n\n{DESCRIPTION}")
        return
    if given == ["--version"]:
        from importlib.metadata import version

        sys.stdout.write(f"unidad {version('unidad_pl')}\n")
        return
    wait_passively_where_busy()
    debug, given = "--debug" in given, [word for word in given if word != "--debug"]
    try:
        first = given[0] if given else "--"
        if first in {command.split()[0] for command in TOOLS}:
            _run_tool(given)
        elif not first.startswith("-") and first not in STAGES:
            refuse(f"unidad: there is no command {first!r}, only {', '.join((*STAGES, *TOOLS))}", 2)
        else:
            _refuse_missing_configs(given)  # before imports that take seconds
            from unidad_pl.cli.lightning import run

            run(given)
    except Exception as error:
        if debug:
            raise
        refuse(f"unidad {_named(given)}: {sentence_of(error)}", 1)


def _refuse_missing_configs(given: Sequence[str]) -> None:
    """End the command where a ``--config`` is the name of a YAML file that is not there."""
    from unidad_pl.files import expanded

    named = [after for word, after in pairwise(given) if word in ("-c", "--config")]
    named += [word.partition("=")[2] for word in given if word.startswith("--config=")]
    for name in named:
        if splitext(name)[1] in (".yaml", ".yml") and "://" not in name and not expanded(name).exists():
            folder = expanded(name).parent
            near = get_close_matches(basename(name), listdir(folder), 1) if isdir(folder) else []
            meant = f" (did you mean {join(dirname(name), near[0])!r}?)" if near else ""
            refuse(f"unidad {_named(given)}: there is no config {name!r}{meant}", 2)


def _explained(commands: Sequence[str]) -> str:
    """What ``unidad --help`` says of them."""
    return "".join(f"{line}\n" for line in DESCRIPTION.splitlines() if line.strip().startswith(tuple(commands)))


def _named(given: Sequence[str]) -> str:
    """The words that name the command."""
    return " ".join(given[:2]) if " ".join(given[:2]) in TOOLS else " ".join(given[:1])


def _run_tool(given: Sequence[str]) -> None:
    """Run a command of :data:`TOOLS`."""
    from importlib import import_module

    import docstring_parser
    from jsonargparse import ArgumentParser

    from unidad_pl.cli.help import PlainFormatter

    class Parser(StrictParser, ArgumentParser):
        """A tool's options."""

    name = _named(given)
    same = [f"unidad {command}" for command in TOOLS if command.split()[0] == given[0]]
    if name not in TOOLS and {"-h", "--help"} & set(given):
        sys.stdout.write(f"usage: {' | '.join(same)}\n\n{_explained(same)}\n{same[0]} --help shows its options\n")
        return
    near = get_close_matches(given[1], [one.split()[-1] for one in same]) if name == given[0] and given[1:] else []
    mistyped = near and not exists(given[1])
    if name not in TOOLS or mistyped:
        refuse(f"unidad {given[0]}: use one of: " + ", ".join(same), 2)
    module, _, function_name = TOOLS[name].partition(":")
    function: Callable[..., Path | str] = getattr(import_module(module), function_name)
    others = [one for one in same if one != f"unidad {name}"]
    told = docstring_parser.parse(function.__doc__ or "")
    parser = Parser(
        prog=f"unidad {name}", description=f"{told.short_description} {told.long_description or ''}",
        formatter_class=PlainFormatter, epilog=f"other commands: {', '.join(others)}" if others else None,
    )  # fmt: skip
    words = [one.name for one in signature(function).parameters.values() if one.kind == one.VAR_POSITIONAL]
    for word in words:
        about = next((one.description for one in told.params if one.arg_name == word), None)
        parser.add_argument(word, nargs="+", type=str, help=about or "one or more")
    parser.add_function_arguments(function, as_group=False)
    options = [_spelled_out(option, function) for option in given[len(name.split()) :]]
    values = dict(parser.instantiate_classes(parser.parse_args(options)))
    operands = [value for word in words for value in values.pop(word)]
    made = function(*operands, **values)
    sys.stdout.write(made if isinstance(made, str) else f"written: {made}\n")


def _spelled_out(option: str, function: Callable[..., Path | str]) -> str:
    """What users may leave out: ``--grid`` means ``--grid=true``, and a list option given twice means both."""
    name, equals, value = option.partition("=")
    parameter = signature(function).parameters.get(name[2:]) if name.startswith("--") else None
    if parameter is not None and parameter.default is False and not equals:
        return f"{option}=true"
    if parameter is not None and str(parameter.annotation).startswith("list["):
        return f"{name}+{equals}{value}"
    return option

"""`unidad`: fit, validate, test and predict from YAML configs and command-line options (LightningCLI), and tools.

unidad fit --config configs/quickstart.yaml
unidad test --config runs/quickstart/version_0/config.yaml --ckpt_path runs/quickstart/version_0/checkpoints/last.ckpt
"""

from __future__ import annotations

import sys
from inspect import signature
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TOOLS = {
    "import adm": "unidad_pl.backbones.adm_files:import_adm",
    "restore adm": "unidad_pl.backbones.adm_files:restore_adm",
    "export": "unidad_pl.export.student:export_student",
    "sample": "unidad_pl.cli.sample:sample",
    "report memory": "unidad_pl.cli.report_memory:report_memory",
    "report subjects": "unidad_pl.cli.report_subjects:report_subjects",
}
"""Commands beside Lightning's: words on the command line -> module:function, whose arguments are the options."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the ``unidad`` command; ``args`` default to the command line's."""
    given = list(sys.argv[1:] if args is None else args)
    if given == ["--version"]:  # answered before torch is imported
        from importlib.metadata import version

        sys.stdout.write(f"unidad {version('unidad_pl')}\n")
        return
    if given and given[0] in {command.split()[0] for command in TOOLS}:
        _run_tool(given)
        return
    from unidad_pl.cli.lightning import run

    run(None if args is None else given)


def _run_tool(given: Sequence[str]) -> None:
    """Run a command of :data:`TOOLS`; what is wrong with the request is one line, not a traceback."""
    from importlib import import_module

    from jsonargparse import ArgumentParser

    same = {command: place for command, place in TOOLS.items() if command.split()[0] == given[0]}
    name = given[0] if given[0] in same else " ".join(given[:2])
    if name not in same:
        sys.exit(f"unidad {given[0]}: use one of: " + ", ".join(f"unidad {command}" for command in same))
    module, _, function_name = same[name].partition(":")
    function: Callable[..., Path | str] = getattr(import_module(module), function_name)
    parser = ArgumentParser(prog=f"unidad {name}", description=(function.__doc__ or "").partition("\n\n")[0])
    parser.add_function_arguments(function, as_group=False)
    options = [_spelled_out(option, function) for option in given[len(name.split()) :]]
    request = parser.instantiate_classes(parser.parse_args(options))
    try:
        made = function(**request)
    except (ValueError, OSError) as error:
        sys.exit(f"unidad {name}: {error}")
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

"""`unidad`: fit, validate, test and predict from YAML configs and command-line options (LightningCLI), and tools.

unidad fit --config configs/quickstart.yaml
unidad test --config runs/quickstart/version_0/config.yaml --ckpt_path runs/quickstart/version_0/checkpoints/last.ckpt
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

DESCRIPTION = """Few-step few-shot image generation: distil a diffusion model to 1-4 steps and adapt it to a new
domain from about ten images, in one training run (Uni-DAD).

  unidad fit --config configs/quickstart.yaml           ten cartoon portraits with sunglasses, on any laptop
  unidad fit --config configs/quickstart.yaml --data.domain null --data.root FOLDER     your own images
  unidad fit --help                                     every option of a subcommand
  unidad fit --config FILE --print_config               the whole config a run would use
  unidad import adm --checkpoint FILE --preset ffhq256 --out FOLDER     a guided-diffusion model as a source model
  unidad restore adm --folder FOLDER --out FILE         such a folder as a guided-diffusion checkpoint again
"""

TOOLS = ("import", "restore")
"""Subcommands beside Lightning's; each has subcommands of its own."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the ``unidad`` command; ``args`` default to the command line's."""
    given = list(sys.argv[1:] if args is None else args)
    if given == ["--version"]:  # answered before torch is imported
        from importlib.metadata import version

        sys.stdout.write(f"unidad {version('unidad_pl')}\n")
        return
    if given and given[0] in TOOLS:
        _run_tool(given[0], given[1:])
        return
    from unidad_pl.lightning_cli import run

    run(None if args is None else given)


def _run_tool(tool: str, args: Sequence[str]) -> None:
    """Run ``unidad TOOL ...``; what is wrong with the request is one line, not a traceback."""
    from jsonargparse import ArgumentParser

    from unidad_pl.backbones.adm_files import import_adm, restore_adm

    tools: dict[str, dict[str, Callable[..., Path]]] = {"import": {"adm": import_adm}, "restore": {"adm": restore_adm}}
    functions = tools[tool]
    parser = ArgumentParser(prog=f"unidad {tool}")
    kinds = parser.add_subcommands(dest="kind")
    for name, function in functions.items():
        one = ArgumentParser(description=(function.__doc__ or "").partition("\n\n")[0])
        one.add_function_arguments(function, as_group=False)
        kinds.add_subcommand(name, one)
    request = parser.parse_args(list(args))
    try:
        made = functions[request.kind](**request[request.kind])
    except (ValueError, OSError) as error:
        sys.exit(f"unidad {tool}: {error}")
    sys.stdout.write(f"written: {made}\n")


if __name__ == "__main__":
    main()

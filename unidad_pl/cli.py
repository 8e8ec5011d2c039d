"""`unidad`: fit, validate, test and predict from YAML configs and command-line options (LightningCLI).

unidad fit --config configs/quickstart.yaml
unidad test --config runs/quickstart/version_0/config.yaml --ckpt_path runs/quickstart/version_0/checkpoints/last.ckpt
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

DESCRIPTION = """Few-step few-shot image generation: distil a diffusion model to 1-4 steps and adapt it to a new
domain from about ten images, in one training run (Uni-DAD).

  unidad fit --config configs/quickstart.yaml           ten cartoon portraits with sunglasses, on any laptop
  unidad fit --config configs/quickstart.yaml --data.domain null --data.root FOLDER     your own images
  unidad fit --help                                     every option of a subcommand
  unidad fit --config FILE --print_config               the whole config a run would use
"""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the ``unidad`` command; ``args`` default to the command line's."""
    given = list(sys.argv[1:] if args is None else args)
    if given == ["--version"]:  # answered before torch is imported
        from importlib.metadata import version

        sys.stdout.write(f"unidad {version('unidad_pl')}\n")
        return
    from unidad_pl.lightning_cli import run

    run(None if args is None else given)


if __name__ == "__main__":
    main()

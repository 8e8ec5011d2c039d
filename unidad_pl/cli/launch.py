"""Variables of a launcher (torchrun, srun) that are in the environment although it did not start this run."""

from __future__ import annotations

from collections.abc import Mapping

LAUNCHED = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, and Lightning for the processes it starts itself, set together."""


def check_launcher(processes: int, environ: Mapping[str, str]) -> None:
    """Refuse a run that stray variables would silence, multiply, or leave waiting for ranks that nobody started.

        >>> check_launcher(1, {})
        >>> check_launcher(1, {"RANK": "3"})
        Traceback (most recent call last):
        ...
        RuntimeError: RANK=3 is set in the environment, but this run has one process, which would ...

    Args:
        processes: of the trainer: devices times nodes.
        environ: the environment.

    Raises:
        RuntimeError: names the variables, and the way out.
    """
    ranks = _named(environ, [n for n in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if environ.get(n, "0") != "0"])
    many = [n for n in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS") if environ.get(n, str(processes)) != str(processes)]
    if processes == 1 and (ranks or many):
        does = "which would log nothing" if ranks else "and so has each of the others: all write the same files"
        raise RuntimeError(
            f"{ranks or _named(environ, many)} is set in the environment, but this run has one process, {does}. If a "
            f"launcher started it, set --trainer.devices and --trainer.num_nodes to its processes and "
            f"--trainer.strategy unidad_ddp; else unset the variable"
        )
    if processes > 1 and many:
        raise RuntimeError(
            f"{_named(environ, many)} is set in the environment, but --trainer.devices times --trainer.num_nodes is "
            f"{processes}: make them equal, or unset the variable if no launcher started this run"
        )
    missing = [name for name in LAUNCHED if name not in environ]
    if processes > 1 and "LOCAL_RANK" in environ and missing:
        raise RuntimeError(
            f"{_named(environ, ['LOCAL_RANK'])} is set in the environment without {', '.join(missing)}: this run would "
            f"wait for {processes - 1} processes that nobody starts. Unset it, or start the run with torchrun or srun"
        )


def _named(environ: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name}={environ[name]}" for name in names)

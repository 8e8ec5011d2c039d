"""Processes of their own for tests, forked from one that has imported everything: importing costs seconds each time."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
# Not a fork of pytest's own process: that has threads, and may have used a GPU.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.fault_script", "unidad_pl.cli.lightning"])


class Apart:
    """``function(*arguments)`` in a fresh process with one thread, in ``folder``; use as a context: no one outlives it.

    ``function`` belongs to a module that can be imported. What it prints is kept in a file.
    """

    def __init__(self, folder: Path, function: Callable[..., Any], *arguments: Any) -> None:
        self.log = folder / "printed.txt"
        self.process = SERVER.Process(target=_begin, args=(folder, self.log, function, arguments))

    def __enter__(self) -> Apart:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT))
            ensure_running()
        self.process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it started

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def run_apart(folder: Path, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> str:
    """Run it to its end, which must be a good one; what it printed."""
    with Apart(folder, function, *arguments) as apart:
        apart.process.join(timeout)
        assert apart.process.exitcode == 0, f"exit code {apart.process.exitcode}: {apart.printed()[-3000:]}"
    return apart.printed()


def _begin(folder: Path, log: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    function(*arguments)

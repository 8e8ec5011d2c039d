"""Two gloo ranks, forked from a process that has imported everything; each leaves one JSON file."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Case = Callable[[int, Path], dict[str, Any] | None]
WAIT = 400.0  # seconds for a case that takes ten; a machine may be slow and busy


def child(case: Case, rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)  # else autograd's threads race for a new pool after the fork, and the process dies
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    began = time.monotonic()
    try:
        result = case(rank, folder) or {}
    except SystemExit as leaving:
        result = {"exit": leaving.code}
    except Exception as error:  # noqa: BLE001 (the test says which it must be)
        result = {"error": f"{type(error).__name__}: {error}"}
    result["seconds"] = time.monotonic() - began
    (folder / f"{case.__name__}{rank}.json").write_text(json.dumps(result))
    os._exit(0)  # not the parent's clean-up


class Pair:
    """Both ranks of a case, begun. Those that shall die or hang are not waited for."""

    def __init__(self, case: Case, folder: Path) -> None:
        fork = multiprocessing.get_context("fork")
        # Kept to the end, not listening: the system gives this port to no one who asks for any, and rank 0 may bind it.
        self.reserved = socket.socket()
        self.reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.reserved.bind(("127.0.0.1", 0))
        port = self.reserved.getsockname()[1]
        self.ranks = [fork.Process(target=child, args=(case, rank, folder, port)) for rank in range(2)]
        for process in self.ranks:
            process.start()
        lost = {"killed": 1, "hung": 1, "frozen": 0}.get(case.__name__)
        self.awaited = [process for rank, process in enumerate(self.ranks) if rank != lost]

    def end(self) -> None:
        for process in self.awaited:
            process.join(WAIT)
        for process in self.ranks:
            process.kill()
            process.join()
        self.reserved.close()


def two_ranks(folder: Path, *cases: Case, meanwhile: Callable[[], Any] | None = None) -> None:
    """All of the cases at once, each with two ranks of its own, and something in this process."""
    pairs = [Pair(case, folder) for case in cases]
    if meanwhile:
        meanwhile()
    for pair in pairs:
        pair.end()

"""One failed rank ends the whole job, and every rank says why: failures are shared through the group's store."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch.distributed.distributed_c10d import _get_default_store

from unidad_pl.store import ask

KEY = "unidad_pl/failure"
GRACE = 3.0  # seconds; Lightning kills the ranks it started itself five seconds after one died


class FailFastStrategy(ParallelStrategy):
    """What a strategy of several processes needs so that the failure of one ends all, with its message."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Rank 0 writes; where it cannot, every rank raises, so that none waits for it.

        Raises:
            OSError: as rank 0 saw it.
        """
        failure: OSError | None = None
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except OSError as error:
            failure = error
        failure = self.broadcast(failure)
        if failure is not None:
            raise failure

    def on_exception(self, exception: BaseException) -> None:
        """Tell every rank which one failed, and why: what the others see is only that it does not answer."""
        super().on_exception(exception)
        if not dist.is_initialized() or self.world_size == 1 or not isinstance(exception, Exception):
            return
        silent = share_failure(exception, self.global_rank, self.world_size, self._died)
        for rank, process in self._children().items():
            if rank in silent:
                process.kill()  # it hangs, and would stay when this process has gone

    def _children(self) -> dict[int, Any]:
        """The ranks that Lightning started from this process."""
        first = self.node_rank * len(self.parallel_devices or []) + 1
        return dict(enumerate(getattr(self.launcher, "procs", ()), first))

    def _died(self) -> set[int]:
        return {rank for rank, process in self._children().items() if process.poll() is not None}


def share_failure(exception: Exception, rank: int, world: int, died: Callable[[], set[int]]) -> set[int]:
    """Give an error that only says "no answer" the message of the rank that failed, through the group's store.

    A rank with an error of its own publishes it and closes its connections, so that the others notice at once.

    Args:
        exception: what this rank saw; its message is replaced.
        rank: this one.
        world: how many there are.
        died: the ranks that need not be waited for.

    Returns:
        The ranks that do not answer.
    """
    lost = _is_silence(exception)
    silent: set[int] = set()

    def share() -> None:
        store, everyone = _get_default_store(), set(range(world))
        store.set(f"{KEY}/{rank}", "" if lost else f"{type(exception).__name__}: {exception}")
        if lost:
            said = _read(store, f"{KEY}/", everyone, died)
            silent.update(everyone - set(said))
            causes = [f"rank {r} failed with {text}" for r, text in sorted(said.items()) if text]
            causes = causes or [f"rank {r} does not answer (dead or hung)" for r in sorted(silent)]
            causes = causes or ["every rank answers, one of them too late: give the strategy a longer timeout"]
            exception.args = ("; ".join([*causes, f"what rank {rank} saw: {exception}"]),)
        else:
            dist.destroy_process_group()
        store.set(f"{KEY}/read/{rank}", "")
        if rank == 0:  # the store lives here
            _read(store, f"{KEY}/read/", everyone - silent, died)

    try:
        ask(share, 3 * GRACE)
    except (RuntimeError, OSError):  # the store is gone, or frozen, with rank 0
        if lost:
            exception.args = (f"rank 0 does not answer (dead or hung); what rank {rank} saw: {exception}",)
    return silent


def _is_silence(exception: Exception) -> bool:
    """Whether a collective failed because another rank did not take part."""
    text = str(exception).lower()
    words = (
        "gloo",
        "nccl",
        "connection closed by peer",
        "connection reset by peer",
        "timed out waiting",
        "application timeout caused pair closure",  # gloo, of a peer that an earlier operation had waited for
        "does not answer",
    )
    lost_store = isinstance(exception, (dist.DistNetworkError, dist.DistStoreError))  # the store is gone with rank 0
    return lost_store or (isinstance(exception, RuntimeError) and any(word in text for word in words))


def _read(store: Any, prefix: str, ranks: set[int], died: Callable[[], set[int]]) -> dict[int, str]:
    """What the ``ranks`` have set under ``prefix``, waiting :data:`GRACE` seconds for the slower ones."""
    until = time.monotonic() + GRACE
    said: dict[int, str] = {}
    while True:
        for rank in ranks - set(said):
            if store.check([f"{prefix}{rank}"]):
                said[rank] = store.get(f"{prefix}{rank}").decode()
        if ranks <= set(said) | died() or time.monotonic() > until:
            return said
        time.sleep(0.02)

"""Questions to the store of a process group, which lives in rank 0: they end although rank 0 is dead or frozen."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def ask(question: Callable[[], T], seconds: float) -> T:
    """The answer of ``question``, which is asked in a thread: a client of a frozen store waits without an end.

        >>> ask(lambda: 1 + 1, seconds=5)
        2

    Raises:
        RuntimeError: there was none in time.
        Exception: what ``question`` raised.
    """
    answers: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(question())
        except Exception as error:  # noqa: BLE001 (raised below, where it is of use)
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise RuntimeError(f"rank 0 does not answer (dead or frozen): its store was silent for {seconds:g} s")
    return answers[0]

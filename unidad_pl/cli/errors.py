"""How a command ends that cannot do what it was asked: one sentence on stderr, and 1 (wrong content) or 2 (usage)."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value|Expected a path but |Expected a <class 'NoneType'>"
    r"|Problem with given class_path .*:$|Parser key .*:$"
)
LONGEST = 1000


class Refused(SystemExit):
    """The end of a command, with the sentence that was written to stderr.

    >>> Refused("no config at 'x.yaml'", 1).code
    1
    """

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


def refuse(sentence: str, code: int) -> NoReturn:
    """Say ``sentence`` and end the command."""
    sys.stderr.write(f"{sentence}\n")
    raise Refused(sentence, code)


class StrictParser:
    """For parsers of jsonargparse: no abbreviations at any depth, and errors of one sentence.

    >>> from jsonargparse import ArgumentParser
    >>> class Parser(StrictParser, ArgumentParser): ...
    >>> Parser(prog="unidad").allow_abbrev
    False
    """

    prog: str
    exit_on_error: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the command; a parser for a part of another one hands its error up."""
        if not self.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]
        prog = self.prog.replace(" [options]", "")
        refuse(f"{prog}: {essence(message)} ({prog} --help shows the options)", 2)


def essence(text: str) -> str:
    """What is wrong, of the tree of attempts that jsonargparse reports: the option, and the first reason.

    >>> essence('Parser key "model":\\n  Does not validate against any:\\n    - r1 must be at least 0')
    'model: r1 must be at least 0'
    """
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip()]
    if not any(NOISE.match(line) or line.startswith("Parser key ") for line in lines):
        return " ".join(lines)
    options: list[str] = []
    for line in lines:
        options += re.findall(r'Parser key "([^"]+)"', line)
        reason = re.sub(r'^Parser key "[^"]+": ?', "", line)
        if reason and not NOISE.match(reason):
            return f"{'.'.join(options)}: {reason}" if options else reason
    return " ".join(lines)


def sentence_of(error: Exception) -> str:
    """An exception in one line; what is no refusal of ours or of a library keeps its type's name."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    text = essence(str(error))
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ..."
    if text and isinstance(error, (ValueError, OSError, RuntimeError, ImportError, MisconfigurationException)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"

"""How a command ends that cannot do what it was asked: one sentence on stderr, and 1 (wrong content) or 2 (usage)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NoReturn

NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value|Expected a path but |Expected a <class 'NoneType'>"
    r"|Problem with given class_path .*:$|Parser key .*:$"
)
PLAIN = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
"""What jsonargparse calls a type -> what to write for it in YAML."""
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
        refuse(f"{prog}: {essence(message)}{way_out(message)} ({prog} --help shows the options)", 2)


def essence(text: str) -> str:
    """What is wrong, of the tree of attempts that jsonargparse reports: the option, and the first reason.

    >>> essence('Parser key "model":\\n  Does not validate against any:\\n    - r1 must be at least 0')
    'model: r1 must be at least 0'
    """
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip()]
    if not any(NOISE.match(line) or line.startswith("Parser key ") for line in lines):
        return " ".join(lines)
    options: list[str] = []
    sentence = choices(text)
    lines = [sentence] if sentence else sorted(lines, key=_is_of_a_type)
    for line in lines:
        options += re.findall(r'Parser key "([^"]+)"', line)
        reason = re.sub(r'^Parser key "[^"]+": ?', "", line)
        reason = re.sub(r"^Expected a <class '(\w+)'>\. Got value:", _plain, reason)
        reason = reason.replace("Expected a dot import path string:", "must be the path of a class, MODULE.NAME, got")
        if reason and not NOISE.match(reason):
            return f"{'.'.join(options)}: {reason}" if options else reason
    return " ".join(lines)


def way_out(text: str) -> str:
    """What to do about a class that is not found or not given, where that can be told; else nothing.

    >>> way_out("Option 'student.num_steps' is not accepted")
    ': the class has no such option, or no config before this one gives its class_path'
    """
    if re.search("Option '.*' is not accepted", text):
        return ": the class has no such option, or no config before this one gives its class_path"
    if re.search(r"arguments are required: .*\b(model|data)\b", text):
        return ": a config that has both comes first: --config configs/quickstart.yaml --config ..."
    missing = re.search(r"No module named '(\w+)'", text)
    if missing and (Path(missing[1]).is_dir() or Path(f"{missing[1]}.py").is_file()):
        return ": it lies in this folder, which Python does not search: PYTHONPATH=. unidad ..."
    return ""


def choices(text: str) -> str | None:
    """The sentence about an option that takes one of several words and plain values; None of other options.

    >>> choices('Parser key "a":\\n  Subtypes: ' "[<class 'int'>, typing.Literal['no'], <class 'NoneType'>]\\n"
    ...         '  Errors:\\n  Given value: x')
    'Parser key "a": must be a whole number, no or null, got x'
    """
    found = re.search(r'(Parser key "[^"]+"):\s.*Subtypes: \[(.*?)\]\n.*Given value: ([^\n]*)', text, re.DOTALL)
    kinds = re.compile(r"(?:typing\.Literal\[([^\]]*)\]|<class '(\w+)'>)(?:, )?")
    if found is None or text.count("Subtypes: ") > 1 or kinds.sub("", found[2]):
        return None
    words: list[str] = []
    for literal, plain in kinds.findall(found[2]):
        words += [word.strip("'") for word in literal.split(", ")] if literal else [PLAIN.get(plain, plain)]
    *first, last = dict.fromkeys(words)
    return f"{found[1]}: must be {', '.join(first)} or {last}, got {found[3].strip()}"


def _plain(match: re.Match[str]) -> str:
    return f"must be {PLAIN.get(match[1], match[1])}, got"


def _is_of_a_type(line: str) -> bool:
    """Whether a reason says only that a value is of no type, which the next one may explain."""
    return re.fullmatch(r"Expected a <class '\w+'>", line) is not None


def sentence_of(error: Exception) -> str:
    """An exception in one line; what is no refusal of ours or of a library keeps its type's name."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    before, mark, tree = str(error).partition('Parser key "')  # what jsonargparse reports may have words of ours before
    text = f"{before}{essence(mark + tree)}{way_out(tree)}" if mark else essence(before)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ..."
    if text and isinstance(error, (ValueError, OSError, RuntimeError, ImportError, MisconfigurationException)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"

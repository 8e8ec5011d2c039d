"""How a command ends that cannot do what it was asked: one sentence on stderr, and 1 (wrong content) or 2 (usage)."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value|Expected a path but |Expected a <class 'NoneType'>"
    r"|Problem with given class_path .*:$|Parser key .*:$"
)
GIVEN = "Given value: "
PLAIN = re.compile(r"typing\.Literal\[([^\]]*)\]|<class '(\w+)'>")
IN_YAML = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
"""What jsonargparse calls a type -> what to write for it in YAML."""
UNKNOWN = re.compile(r"(?:unrecognized arguments: --|Option '|Group '(\w+)' does not accept option ')([\w.]+)")
MEANT = " (did you mean "
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
    _actions: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the command; a parser for a part of another one hands its error up."""
        message += self._did_you_mean(message)
        if not self.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]
        prog = self.prog.replace(" [options]", "")
        refuse(f"{prog}: {essence(message)}{way_out(message)} ({prog} --help shows the options)", 2)

    def _did_you_mean(self, message: str) -> str:
        """The option of this parser that is nearest to the unknown one of ``message``, if one is near."""
        unknown = UNKNOWN.match(message)
        name = ".".join(filter(None, unknown.groups())) if unknown else ""
        near = get_close_matches(name, [action.dest for action in self._actions], 1, 0.75)
        return f"{MEANT}{near[0]}?)" if near and MEANT not in message else ""


def essence(text: str) -> str:
    """What is wrong, of the tree of attempts that jsonargparse reports: the option, and the first reason.

    >>> essence('Parser key "model":\\n  Does not validate against any:\\n    - r1 must be at least 0')
    'model: r1 must be at least 0'
    """
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip()]
    if not any(NOISE.match(line) or line.startswith("Parser key ") for line in lines):
        return " ".join(lines)
    options: list[str] = []
    vague = ""
    for place, line in enumerate(lines):
        options += re.findall(r'Parser key "([^"]+)"', line)
        reason = re.sub(r'^Parser key "[^"]+": ?', "", line)
        if one := re.fullmatch(r"Subtypes: \[(.*)\]", line):
            given = next((after for after in lines[place:] if after.startswith(GIVEN)), GIVEN)
            reason = must_be(one[1], given.removeprefix(GIVEN)) or ""
        elif one := re.fullmatch(r"Expected a (.*)\. Got value: (.*)", reason):
            reason = must_be(*one.groups()) or reason
        reason = reason.replace("Expected a dot import path string:", "must be the path of a class, MODULE.NAME, got")
        if reason and not NOISE.match(reason):
            sentence = f"{'.'.join(options)}: {reason}" if options else reason
            if not re.fullmatch(r"Expected a <class '\w+'>", reason):
                return sentence
            vague = vague or sentence  # what comes next may explain it
    return vague or " ".join(lines)


def way_out(text: str) -> str:
    """What to do about a class that is not found or not given, where that can be told; else nothing.

    >>> way_out("Option 'student.num_steps' is not accepted")
    ': the class has no such option, or no config before this one gives its class_path'
    """
    if re.search("Option '.*' is not accepted", text) and MEANT not in text:
        return ": the class has no such option, or no config before this one gives its class_path"
    if re.search(r"arguments are required: \w+\.(model|data)\b", text):  # of fit and its like, not of the tools
        return ": a config that has both comes first: --config configs/quickstart.yaml --config ..."
    missing = re.search(r"No module named '(\w+)'", text)
    if missing and (Path(missing[1]).is_dir() or Path(f"{missing[1]}.py").is_file()):
        return ": it lies in this folder, which Python does not search: PYTHONPATH=. unidad ..."
    return ""


def must_be(types: str, value: str) -> str | None:
    """What an option takes whose ``types`` are plain ones and words, as jsonargparse writes them; None of other types.

    >>> must_be("<class 'int'>, typing.Literal['no'], <class 'NoneType'>", "x")
    'must be a whole number, no or null, got x'
    """
    if PLAIN.sub("", types).strip(", "):
        return None
    words: list[str] = []
    for listed, plain in PLAIN.findall(types):
        words += [word.strip("'") for word in listed.split(", ")] if listed else [IN_YAML.get(plain, plain)]
    *first, last = dict.fromkeys(words)
    return f"must be {' or '.join([', '.join(first), last] if first else [last])}, got {value}"


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

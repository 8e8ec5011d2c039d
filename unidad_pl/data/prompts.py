"""Prompt templates with ``{}`` in the subject's place, from a list, a text file, or DreamBooth's list of subjects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unidad_pl.files import expanded, reading

MAX_BYTES = 2**24
"""A file of prompts is not larger."""
LIVE = ("cat", "dog")
"""DreamBooth's classes of live subjects, which have templates of their own."""
BOTH = "{0} {1}"
"""DreamBooth's placeholders of the rare token and the class word."""
BARE = "a {}"
NO_LIST = (
    "DreamBooth's dataset has it, as prompts_and_classes.txt: put it there; for a subject of your own leave it out and "
    "say what it is (dreambooth: null, class_word: dog)"
)


@dataclass(frozen=True)
class DreamBooth:
    """DreamBooth's ``prompts_and_classes.txt``.

    Attributes:
        classes: name of each subject's folder -> its class word.
        object_templates: prompts for things.
        live_templates: prompts for cats and dogs.
    """

    classes: dict[str, str]
    object_templates: list[str]
    live_templates: list[str]

    def class_of(self, subject: str) -> str:
        """The class word of the subject whose folder is called ``subject``.

        Raises:
            ValueError: it is not in the list.
        """
        if subject not in self.classes:
            raise ValueError(f"subject {subject!r} is not in the list: {', '.join(sorted(self.classes))}")
        return self.classes[subject]

    def templates_of(self, class_word: str) -> list[str]:
        """DreamBooth's 25 templates for subjects of this class; the list's ``a {}``, which shows nothing new, is none
        of them."""
        listed = self.live_templates if class_word in LIVE else self.object_templates
        return [template for template in listed if template != BARE]


def read_dreambooth(path: str | Path) -> DreamBooth:
    """Read DreamBooth's list of subjects and prompts as data; nothing in it is evaluated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no text, or holds no ``subject_name,class`` block, a subject without a class word, or not two
            lists of templates.
    """
    text = _text_of(path, "prompts file", NO_LIST)
    head, *lists = re.split(r"^prompt_list\s*=\s*\[", text, flags=re.MULTILINE)
    classes = dict(_subjects(head.partition("subject_name,class")[2].splitlines()))
    if nameless := [name for name, word in classes.items() if not word]:
        raise ValueError(f"{str(path)!r} has no class word after the comma for {', '.join(map(repr, nameless))}")
    found = [[text for _, text in re.findall(r"""(["'])((?:(?!\1).)*)\1\.format\(""", part)] for part in lists]
    if not classes or len(found) != 2 or any(BOTH not in one for part in found for one in part):
        raise ValueError(
            f"{str(path)!r} is not DreamBooth's prompts_and_classes.txt: it has {len(classes)} 'subject_name,class' "
            f"lines and {len(found)} lists of templates with {BOTH!r}, wanted are some and 2"
        )
    objects, live = ([one.replace(BOTH, "{}") for one in part] for part in found)
    return DreamBooth(classes, objects, live)


def _subjects(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Name and class word of the lines up to the first that is no pair; a sentence after a blank line is none."""
    some = gap = False
    for line in lines:
        if not line.strip():
            gap = some
            continue
        if line.count(",") != 1 or (gap and ", " in line):
            return
        name, _, word = line.partition(",")
        some = True
        yield name.strip(), word.strip()


def _text_of(path: str | Path, what: str, way_out: str) -> str:
    """The text of a file, without a byte order mark."""
    place = expanded(path)
    if not place.is_file():
        raise FileNotFoundError(f"no {what} at {str(path)!r}: {way_out}")
    with reading(path, what, "save it as UTF-8 text"):
        if (size := place.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size} bytes, at most {MAX_BYTES} are taken")
        return place.read_text(encoding="utf-8-sig")


def read_templates(given: str | Sequence[str]) -> list[str]:
    """Prompt templates: one, a list, or the lines of a ``.txt`` file; blank lines do not count.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no text, there are none, or one has not exactly one ``{}``.
    """
    if isinstance(given, str) and given.endswith(".txt"):
        given = _text_of(given, "template file", "give the path of a text with one template a line").splitlines()
    templates = [line.strip() for line in ([given] if isinstance(given, str) else given) if line.strip()]
    if not templates:
        raise ValueError("there are no prompt templates: give at least one, e.g. 'a {}'")
    for template in templates:
        if template.count("{}") != 1 or template.replace("{}", "").count("{"):
            raise ValueError(
                f"the prompt {template!r} must have {{}} once, in the subject's place, e.g. 'a photo of a {{}}'"
            )
    return templates

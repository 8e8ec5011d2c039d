"""What ``--help`` prints of docstrings: they are written for Sphinx, and read in a terminal here."""

from __future__ import annotations

import re
from typing import Any

from jsonargparse import DefaultHelpFormatter

ROLE = re.compile(r":[a-z:]+:`([^`]+)`")


def plain(text: str) -> str:
    """``text`` with the roles and literals of Sphinx as a reader of the pages sees them.

    >>> plain("``edm``: see :func:`~unidad_pl.losses.denoising_weight` and :class:`the grid <unidad_pl.SampleGrid>`")
    'edm: see denoising_weight and the grid'
    """

    def shown(role: re.Match[str]) -> str:
        target = "".join(role[1].split()) if "<" not in role[1] else role[1].partition("<")[0].strip()
        return target.rpartition(".")[2] if target.startswith("~") else target

    return ROLE.sub(shown, text).replace("``", "")


class PlainFormatter(DefaultHelpFormatter):
    """Says plainly what options, groups and descriptions say for Sphinx."""

    def start_section(self, heading: str | None) -> None:
        """Begin a group of options."""
        super().start_section(heading and plain(heading))

    def _split_lines(self, text: str, width: int) -> Any:
        return super()._split_lines(plain(text), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(plain(text), width, indent)

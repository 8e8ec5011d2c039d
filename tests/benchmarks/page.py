"""docs/benchmarks.md from what the other benchmarks wrote.

    python -m tests.benchmarks page --results docs/benchmarks [--out docs/benchmarks.md]

``step.json``, ``evaluation.json``, ``sampling.json``, ``startup.json``, ``scaling.json`` and ``gpu.json`` of the folder
each become a section; one that is not there says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

NAMES = ("step", "evaluation", "sampling", "startup", "scaling", "gpu")


def number(value: Any) -> str:
    """For a table: four digits that count."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(found: dict[str, Any]) -> list[str]:
    """Rows of plain values first; then groups of values, those of equal names side by side; then groups of groups."""
    plain = {name: value for name, value in found.items() if not isinstance(value, dict)}
    groups = {name: value for name, value in found.items() if isinstance(value, dict)}
    nested = {name: group for name, group in groups.items() if any(isinstance(one, dict) for one in group.values())}
    alike: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for name, group in groups.items():
        if name not in nested:
            alike.setdefault(tuple(group), {})[name] = group
    lines = _rows("", {"": plain}) if plain else []
    for same in alike.values():
        lines += _rows("", same)
    for name, group in nested.items():
        rows = {key: value for key, value in group.items() if isinstance(value, dict)}
        columns = dict.fromkeys(column for row in rows.values() for column in row)
        lines += _rows(name, {column: {key: row.get(column, "") for key, row in rows.items()} for column in columns})
    return lines


def _rows(name: str, columns: dict[str, dict[str, Any]]) -> list[str]:
    """A table whose columns have the same keys, a row for each."""
    lines = [f"| {name} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for key in next(iter(columns.values())):
        lines.append(f"| {key} | " + " | ".join(number(column[key]) for column in columns.values()) + " |")
    return [*lines, ""]


def section(name: str, folder: Path) -> list[str]:
    """What the benchmark is, where it ran, and what it found."""
    text = (importlib.import_module(f"tests.benchmarks.{name}").__doc__ or "").strip()
    head, _, rest = text.partition("\n\n")
    lines = [f"## {name}", "", head, ""]
    path = folder / f"{name}.json"
    if not path.is_file():
        return [*lines, "Not measured yet: `" + rest.strip().splitlines()[0].strip() + "` would.", ""]
    found = json.loads(path.read_text())
    where = found.pop("machine", {})
    told = ", ".join(f"{key} {value}" for key, value in where.items() if value is not None)
    lines += ["```sh", rest.strip().splitlines()[0].strip(), "```", "", f"Measured with {told}.", ""]
    plots = sorted(folder.glob(f"{name}*.png"))
    return [*lines, *table(found), *(f"![{name}]({folder.name}/{plot.name})" for plot in plots), ""]


def page(folder: Path) -> str:
    """The whole page."""
    lines = [
        "# Benchmarks", "",
        "Machines are shared and noisy: read ratios, which are measured by turns in one run, and counts (FLOPs, "
        "bytes), which are\nexact. This page is written by "
        "`python -m tests.benchmarks page --results docs/benchmarks`.",
        "",
    ]  # fmt: skip
    for name in NAMES:
        lines += section(name, folder)
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or given.results.with_suffix(".md")
    out.write_text(page(given.results))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

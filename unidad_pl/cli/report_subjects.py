"""`unidad report subjects`: one table over the runs of many subjects, from their metrics.jsonl."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from unidad_pl.callbacks.records import FILE, read_records
from unidad_pl.files import expanded, replacing

SIMILARITY, DIVERSITY = "SubjectSimilarity", "PromptDiversity"
MEAN = "mean"


def report_subjects(runs: str, stage: str = "test", out: str | None = None) -> str:
    """A table of CLIP-I, CLIP-T, DINO and diversity: a row for each subject, and their mean.

    Args:
        runs: folder with the runs in it, at any depth. Of several records of a subject the latest counts.
        stage: ``test`` or ``val``.
        out: CSV file to write the table to as well.

    Returns:
        The table as text.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no run in it has such a record, a record names no subject, or two runs were measured differently.
    """
    if not (place := expanded(runs)).is_dir():
        raise FileNotFoundError(f"no folder {runs!r}: give the one the runs are in")
    found = collect_subjects(place, stage)
    if not found:
        raise ValueError(
            f"no {FILE} below {runs!r} has a {stage} record of the callback {SIMILARITY}: run unidad {stage} first"
        )
    names = list(dict.fromkeys(name for record in found.values() for name in record["values"]))
    rows: dict[str, dict[str, float | None]] = {subject: found[subject]["values"] for subject in sorted(found)}
    mean = {name: _mean([row.get(name) for row in rows.values()]) for name in names}
    table = [["subject", *names]]
    for subject, row in [*rows.items(), (MEAN, mean)]:
        table.append([subject, *("" if (value := row.get(name)) is None else f"{value:.4f}" for name in names)])
    if out is not None:
        with replacing(expanded(out)) as part, part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(table)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = [subject.ljust(widths[0]) for subject, *_ in table]
    right = [[f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)] for row in table]
    lines = ["  ".join([subject, *cells]).rstrip() for subject, cells in zip(left, right, strict=True)]
    return "\n".join([*lines[:-1], "-" * max(map(len, lines)), lines[-1]]) + "\n"


def collect_subjects(runs: Path, stage: str) -> dict[str, dict[str, Any]]:
    """Subject -> its latest record of similarity, with the values of its run's latest record of diversity.

    Raises:
        BrokenFile: a line of a record file is damaged.
        ValueError: a record names no subject, or records differ in what they were measured with.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(runs.rglob(FILE)):
        records = [record for record in read_records(path) if record.get("stage") == stage]
        similar = [record for record in records if record.get("metric") == SIMILARITY]
        if not similar:
            continue
        record = similar[-1]
        if not record.get("subject"):
            raise ValueError(f"{str(path)!r} names no subject: pass subject= to the callback {SIMILARITY}")
        varied = [other for other in records if other.get("metric") == DIVERSITY and other["step"] == record["step"]]
        values = record["values"] | (varied[-1]["values"] if varied else {})
        merged = record | {"values": values, "path": str(path)}
        before = found.get(record["subject"])
        if before is None or before.get("time", "") <= record.get("time", ""):
            found[record["subject"]] = merged
    _check_alike(list(found.values()))
    return found


def _check_alike(records: list[dict[str, Any]]) -> None:
    for name in ("extractor", "samples", "resolution"):
        for record in records[1:]:
            if record.get(name) != records[0].get(name):
                raise ValueError(
                    f"{records[0]['path']!r} was measured with {name} {records[0].get(name)}, {record['path']!r} with "
                    f"{record.get(name)}: one table must not mix them. Measure again, or give a folder without the one"
                )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

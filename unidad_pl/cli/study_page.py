"""What a study found: study.json, a table in Markdown, two charts and a page of pictures."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from unidad_pl.files import BrokenFile, replacing
from unidad_pl.report.pictures import open_png

log = logging.getLogger(__name__)
Column = tuple[str, float, int]
VALUES: dict[str, Column] = {
    "fid": ("Frechet", 1, 1),
    "kid": ("KID", 1, 2),
    "swd": ("sliced Wasserstein", 1, 3),
    "precision": ("precision", 1, 2),
    "intra_lpips_relative": ("diversity %", 100, 0),
    "nearest_relative": ("distance to shots %", 100, 0),
    "memorised": ("near-copies %", 100, 1),
}
"""Metric -> heading, factor and decimals in tables; shares of attributes come after these."""
FACTORS = "distance/"

Rows = list[dict[str, Any]]


def write_results(folder: Path, rows: Rows) -> None:
    """Write everything about the cells that are done into ``folder``."""
    if not rows:
        return
    with replacing(folder / "study.json") as part:
        part.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lacking = charts(folder, rows) + pictures(folder, rows)
    with replacing(folder / "README.md") as part:
        listed = ["Missing:", "", *lacking, ""] if lacking else []
        part.write_text("\n".join([tables(rows), *listed]), encoding="utf-8")


def grouped(rows: Rows, *names: str) -> dict[tuple[Any, ...], Rows]:
    """Rows by their values of ``names``, in the order they come."""
    groups: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def tables(rows: Rows) -> str:
    """Two Markdown tables for each domain, mean and standard deviation over the seeds: metrics, and each factor's
    distance to the held-out images' in %, below it what two halves of the held-out images are apart."""
    parts = []
    for (domain,), of_domain in grouped(rows, "domain").items():
        names = list(dict.fromkeys(name for row in of_domain for name in row["values"]))
        shares = {name: (f"{name.partition('=')[2]} %", 100, 1) for name in names if name.startswith("share/")}
        parts.append(_table(domain, of_domain, {"tflops": ("TFLOPs", 1, 1)} | VALUES | shares))
        factors: dict[str, Column] = {
            name: (name.removeprefix(FACTORS), 100, 1) for name in names if name.startswith(FACTORS)
        }
        if factors:
            table = _table(f"{domain}, factors", of_domain, factors)
            floor = [
                spread([row["floor"].get(heading) for row in of_domain], 100, 1) for heading, _, _ in factors.values()
            ]
            parts.append("\n".join([table, "| " + " | ".join(["two halves", "", *floor]) + " |"]))
    return "\n\n".join(parts) + "\n"


def _table(title: str, rows: Rows, columns: dict[str, Column]) -> str:
    """Of the columns of which there is anything."""
    every = [{"tflops": row["tflops"], **row["values"]} for row in rows]
    columns = {name: how for name, how in columns.items() if any(values.get(name) is not None for values in every)}
    head = [title, "seeds", *(heading for heading, _, _ in columns.values())]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for (method,), same in grouped(rows, "method").items():
        own = [values for row, values in zip(rows, every, strict=True) if row["method"] == method]
        cells = [spread([one.get(name) for one in own], by, places) for name, (_, by, places) in columns.items()]
        lines.append("| " + " | ".join([method, str(len(same)), *cells]) + " |")
    return "\n".join(lines)


def spread(values: list[float | None], factor: float = 1, decimals: int = 2) -> str:
    """``mean +- standard deviation`` of what is known, times ``factor``.

    >>> spread([1.0, 2.0], decimals=1), spread([0.5], 100, 0), spread([None])
    ('1.5 ± 0.7', '50', '-')
    """
    known = [value * factor for value in values if value is not None]
    if not known:
        return "-"
    middle = f"{mean(known):.{decimals}f}"
    return middle if len(known) == 1 else f"{middle} ± {stdev(known):.{decimals}f}"


def _lacking(what: str, cells: Rows) -> list[str]:
    """A point of a list that says what is missing, and of which cells; nothing where it is of none."""
    names = [f"{row['method']}/{row['domain']}/{row['seed']}" for row in cells]
    return [f"- {what}: {', '.join(names)}"] if names else []


def charts(folder: Path, rows: Rows) -> list[str]:
    """``quality.png``: Frechet distance against diversity; ``curves.png``: Frechet distance against TFLOPs.

    Returns:
        What is missing in them.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no charts: they need matplotlib, pip install 'unidad_pl[study]'")
        return ["- the charts: they need matplotlib, pip install 'unidad_pl[study]'"]
    domains = list(grouped(rows, "domain"))
    colours = {method: colormaps["tab20"](number) for number, (method,) in enumerate(grouped(rows, "method"))}
    for name in ("quality", "curves"):
        figure = Figure(figsize=(5.5 * len(domains), 5), layout="constrained")
        axes = figure.subplots(1, len(domains), squeeze=False)[0]
        for axis, (domain,) in zip(axes, domains, strict=True):
            of_domain = [row for row in rows if row["domain"] == domain]
            for (method,), same in grouped(of_domain, "method").items():
                shape = _points(same) if name == "quality" else _curve(same)
                axis.plot(*shape, "o" if name == "quality" else ".-", label=method, color=colours[method])
            axis.set(title=domain, yscale="log", ylabel="Frechet distance (lower is better)",
                     xlabel="diversity, share of held-out" if name == "quality" else "TFLOPs of training")  # fmt: skip
            axis.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
            axis.grid(alpha=0.3)
        shown = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        methods = [method for method in colours if method in shown]  # a domain may have some of them only
        figure.legend([shown[method] for method in methods], methods, loc="outside lower center", ncols=5, fontsize=9)
        with replacing(folder / f"{name}.png") as part:
            figure.savefig(part, dpi=110, format="png")
    return [
        *_lacking("in quality.png, no fid or no intra_lpips_relative was measured", [
            row for row in rows if not _points([row])[0]]),
        *_lacking("in curves.png, no fid was measured at some validations or at all", [
            row for row in rows if not row["curve"] or len(_curve([row])[0]) < len(row["curve"])]),
    ]  # fmt: skip


def _known(values: Rows, *names: str) -> list[tuple[float, ...]]:
    """The values of ``names`` where all of them were measured."""
    return [tuple(one[name] for name in names) for one in values if all(one.get(name) is not None for name in names)]


def _points(rows: Rows) -> tuple[list[float], list[float]]:
    """Each seed's diversity and Frechet distance, where it has both."""
    found = _known([row["values"] for row in rows], "intra_lpips_relative", "fid")
    return [diversity for diversity, _ in found], [fid for _, fid in found]


def _curve(rows: Rows) -> tuple[list[float], list[float]]:
    """The mean over seeds at every validation; a stage before it is on the axis and not in the line."""
    validations = zip_longest(*(row["curve"] for row in rows), fillvalue={})
    points = [found for same in validations if (found := _known(list(same), "tflops", "fid"))]
    return [mean(cost for cost, _ in same) for same in points], [mean(fid for _, fid in same) for same in points]


def pictures(folder: Path, rows: Rows) -> list[str]:
    """``pictures_DOMAIN.png``: a row of samples for each method, of its first seed that has a picture; the samples in a
    column have the same noise.

    Returns:
        What is missing in them.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    lacking: Rows = []
    for (domain,), of_domain in grouped(rows, "domain").items():
        strips: list[tuple[str, Any]] = []
        for (method,), same in grouped(of_domain, "method").items():
            for row in same:
                try:
                    strip = open_png(folder / row["run"] / (row["picture"] or "no.png"))
                except (BrokenFile, OSError):
                    lacking.append(row)
                else:
                    strips.append((method, strip))
                    break
        if not strips:
            continue
        label, height = 200, max(strip.height for _, strip in strips) + 4
        page = Image.new("RGB", (label + max(strip.width for _, strip in strips), height * len(strips)), "white")
        for number, (method, strip) in enumerate(strips):
            page.paste(strip, (label, number * height))
            ImageDraw.Draw(page).text((4, number * height + height // 2 - 6), method, fill="black")
        with replacing(folder / f"pictures_{domain}.png") as part:
            Image.fromarray(np.asarray(page)).save(part, format="png")
    return _lacking("no picture of samples (of the callback SampleGrid), or one that cannot be read", lacking)

"""``unidad report RUN [RUN ...]``: one HTML file with everything in it, that opens without a network."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unidad_pl.callbacks.environment import unidad_command
from unidad_pl.files import expanded, replacing
from unidad_pl.report.charts import metric_charts, training_charts
from unidad_pl.report.difference import REQUIRED, as_text, differences_from_defaults
from unidad_pl.report.folder import Run, read_run_folder
from unidad_pl.report.pictures import Pictures, read_pictures
from unidad_pl.runs.config import CHECKPOINT_DEFAULTS, CONFIG_FILE, TRAINER_DEFAULTS

FILE, TEMPLATE = "report.html", "page.html"
NEEDED = ("jinja2", "plotly")
MOST_BYTES, PICTURE_BYTES = 8_000_000, 2_200_000
MINUTE, HOUR = 60, 3600
FEW_STEP = ("UniDAD",)


def report(*runs: str, out: str | None = None) -> Path:
    """Write one HTML page about a run, or about several side by side; it holds its pictures and opens offline.

    Shown are the shots and their clusters, samples over training, losses, metrics, what the config changes, versions,
    and the commands that come next. Reading needs no GPU and changes nothing, while a run is going on too. What is
    missing or damaged in a run folder is listed at the top of the page.

    Args:
        runs: run folders. One is what unidad fit makes and names at its end, such as runs/quickstart/version_0, which
            unidad fit --config configs/quickstart.yaml writes.
        out: the file to write; null: report.html in the run folder, or for several runs in the folder you are in.

    Returns:
        The file.

    Raises:
        FileNotFoundError, ValueError: a folder that is none of a run. What a run folder lacks, the page says.
        ImportError: plotly or jinja2 is not installed.
        OSError: the file cannot be written.
    """
    folders = [expanded(run) for run in runs]
    target = expanded(out) if out else (folders[0] if len(folders) == 1 else Path()) / FILE
    return write_page(folders, target)


def can_write() -> bool:
    """Whether what the page needs is installed."""
    return all(find_spec(name) for name in NEEDED)


def write_page(folders: Sequence[Path], target: Path) -> Path:
    """The same for Python.

        >>> write_page([Path("runs/quickstart/version_0")], Path("report.html"))  # doctest: +SKIP

    Returns:
        ``target``.

    Raises:
        as :func:`report`.
    """
    if not can_write():
        raise ImportError("the page needs plotly and jinja2: pip install 'unidad_pl[report]'")
    runs = [read_run_folder(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    html = render(runs)
    with replacing(target) as part:
        part.write_text(html, encoding="utf-8")
    return target


def render(runs: Sequence[Run]) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    pictures = [read_pictures(run, PICTURE_BYTES // len(runs)) for run in runs]
    for run, own in zip(runs, pictures, strict=True):
        run.missing += own.missing
    environment = Environment(
        loader=PackageLoader("unidad_pl", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = number
    return environment.get_template(TEMPLATE).render(
        runs=list(zip(runs, pictures, strict=True)), overview=overview(runs), metrics=metric_charts(runs),
        training=training_charts(runs), config=config_rows(runs), made_with=made_with(runs),
        commands={run.name: commands(run) for run in runs}, best={run.name: best_text(run) for run in runs},
        reference=reference_text, plotly=get_plotlyjs(),
    )  # fmt: skip


def number(value: Any) -> str:
    """A number with the digits that matter.

    >>> number(12.34567), number(1200000.0), number(None)
    ('12.35', '1.2e+06', '-')
    """
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"


def duration(seconds: float) -> str:
    """
    >>> duration(75), duration(7300), duration(3)
    ('1 min 15 s', '2 h 1 min', '3 s')
    """
    if seconds < MINUTE:
        return f"{seconds:.0f} s"
    if seconds < HOUR:
        return f"{int(seconds // MINUTE)} min {int(seconds % MINUTE)} s"
    return f"{int(seconds // HOUR)} h {int(seconds % HOUR // MINUTE)} min"


Table = list[tuple[str, list[str]]]


def overview(runs: Sequence[Run]) -> Table:
    """Label -> text for each run: how far it came, and the last and best values."""
    rows: dict[str, list[str]] = {"module": [run.module or "-" for run in runs]}
    rows["iterations"] = [f"{run.iterations} of {run.max_steps or '?'}" for run in runs]
    for stage in ("val", "test"):
        metrics = [run.metrics(stage) for run in runs]
        for name in dict.fromkeys(name for own in metrics for name in own):
            rows[f"{stage}/{name}"] = [_ends(own.get(name)) for own in metrics]
    return list(rows.items())


def _ends(curve: Any) -> str:
    if curve is None:
        return "-"
    first, last = number(curve.values[0]), number(curve.values[-1])
    return last if len(curve.values) == 1 else f"{first} → {last}"


def best_text(run: Run) -> str:
    """Which evaluation was the best, and where its weights are."""
    best = run.best()
    if best is None:
        metric = run.monitor()[0]
        return (f"No evaluation is the best: none has a value of {metric}. Evaluations are compared by what "
                f"checkpoint.monitor names, or by fid where it names nothing.")  # fmt: skip
    name, step, value = best
    files = [path.name for path, own in run.checkpoints.items() if own == step]
    if step == run.iterations and not files and (last := run.last_checkpoint()):
        files = [last.name]
    where = f"its weights are in checkpoints/{files[0]}" if files else (
        f"no checkpoint of it was kept: --checkpoint.monitor val/{name} keeps the best")  # fmt: skip
    steps = sorted({one["step"] for one in run.records if one.get("stage") == "val" and name in one["values"]})
    without = [str(one) for one in steps if one not in run.metrics()[name].steps]
    nothing = f" At iteration {', '.join(without)} {name} has no finite value." if without else ""
    return f"Best evaluation (a star in the plots): iteration {step}, {name} {number(value)}; {where}.{nothing}"


def reference_text(run: Run, pictures: Pictures) -> str:
    """What the samples are compared with."""
    record = pictures.evaluation or next((one for one in reversed(run.records) if "reference" in one), {})
    data, reference = ("data", "init_args"), run.option("data", "init_args", "reference", "root")
    root = run.option(*data, "root")
    if not record.get("reference"):
        return "No metric of this run compared its samples with reference images."
    if record.get("reference_is_shots"):
        return "The reference is the shots themselves: values say how closely they are copied, not how well met."
    shots = " without the shots" if run.option(*data, "reference", "exclude_shots") else ""
    where = f" from {reference or root}{shots}" if reference or root else ""
    text = f"The reference is {record['reference']} other images of the domain{where}."
    if isinstance(record.get("nearest_of_reference"), (int, float)):
        text += (f" They lie {number(record['nearest_of_reference'])} from their nearest shot on average, "
                 f"the samples {number(record.get('nearest_mean'))}.")  # fmt: skip
    return text


def config_rows(runs: Sequence[Run]) -> list[tuple[str, list[str], str]]:
    """(option, each run's value, default) of all options that differ from their default in a run."""
    standard = {f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items() if name != "logger"}
    standard |= {f"checkpoint.{name}": value for name, value in CHECKPOINT_DEFAULTS.items()}
    found = [differences_from_defaults(run.config, standard) for run in runs]
    rows = []
    for name in dict.fromkeys(name for own in found for name in own):
        default = next(own[name][1] for own in found if name in own)
        values = [as_text(own[name][0] if name in own else _value(run, name, default))
                  for run, own in zip(runs, found, strict=True)]  # fmt: skip
        rows.append((name, values, "" if default is REQUIRED else as_text(default)))
    return rows


def _value(run: Run, name: str, default: Any) -> Any:
    """What a run has where it does not differ: the default, or nothing at all."""
    return default if run.config and default is not REQUIRED else "-"


def made_with(runs: Sequence[Run]) -> Table:
    """Versions, hardware, time and cost."""
    rows: dict[str, list[str]] = {}

    def add(label: str, values: list[str]) -> None:
        if any(value != "-" for value in values):
            rows[label] = values

    last = [run.starts[-1] if run.starts else {} for run in runs]
    packages: list[dict[str, Any]] = [found if isinstance(found := one.get("packages"), dict) else {} for one in last]
    for name in dict.fromkeys(name for own in packages for name in own):
        add(str(name), [str(own.get(name, "-")) for own in packages])
    for name in ("python", "git", "host", "processor", "cores", "gpus", "cuda", "processes", "precision", "command"):
        add(name, [_listed(one.get(name)) for one in last])
    add("starts", [str(len([one for one in run.starts if one.get("stage") != "test"]) or "-") for run in runs])
    add("begun", [_listed(run.starts[0].get("time")) if run.starts else "-" for run in runs])
    add("time", [duration(run.logged.seconds) if run.logged.seconds else "-" for run in runs])
    add("iterations per second", [
        number(run.iterations / run.logged.seconds) if run.logged.seconds else "-" for run in runs])  # fmt: skip
    add("TFLOPs of training", [number(run.cost.get("tflops", max(run.tflops().values(), default=None)))
                               for run in runs])  # fmt: skip
    evaluations = [run.cost.get("evaluations") for run in runs]
    networks = dict.fromkeys(name for own in evaluations if isinstance(own, dict) for name in own)
    for name in networks:
        add(f"images through {name}", [number(own.get(name)) if isinstance(own, dict) else "-" for own in evaluations])
    return list(rows.items())


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else "-" if value is None else str(value)


def commands(run: Run) -> list[tuple[str, str]]:
    """(what for, command) to go on from here, as a shell takes them."""
    unidad, config, checkpoint = unidad_command(), run.folder / CONFIG_FILE, run.last_checkpoint()
    if checkpoint is None:
        return []
    at, found = shlex.quote(str(checkpoint)), []
    if config.is_file():
        more, same = 2 * max(run.iterations, run.max_steps or 0), f"--config {shlex.quote(str(config))}"
        found = [
            ("go on, to twice as many iterations", f"{unidad} fit {same} --ckpt_path last --trainer.max_steps {more}"),
            ("measure the last weights", f"{unidad} test {same} --ckpt_path {at}"),
        ]
        if run.module not in FEW_STEP:
            found.append(("draw samples", f"{unidad} predict {same} --ckpt_path {at}"))
    if run.module in FEW_STEP:
        out = [shlex.quote(str(run.folder / name)) for name in ("images", "export")]
        found.append(("draw 64 samples", f"{unidad} sample --model {at} --num 64 --out {out[0]} --grid"))
        found.append(("export, for any DiffusionPipeline", f"{unidad} export --ckpt_path {at} --out {out[1]}"))
    return [*found, ("write this page again", f"{unidad} report {shlex.quote(os.fspath(run.folder))}")]

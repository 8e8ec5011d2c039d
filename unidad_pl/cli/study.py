"""`unidad study`: methods against each other on several domains and seeds, at equal compute, as ordinary fits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

from unidad_pl.callbacks.cost import FILE as COST_FILE
from unidad_pl.callbacks.environment import git_commit
from unidad_pl.callbacks.records import FILE as METRICS_FILE
from unidad_pl.callbacks.records import read_records
from unidad_pl.checks import check_given, check_positive, check_whole
from unidad_pl.cli.errors import sentence_of
from unidad_pl.cli.study_page import write_results
from unidad_pl.export.student import export_student
from unidad_pl.files import BrokenFile, alone_in, expanded, read_json, reading, replacing
from unidad_pl.runs.checkpoints import newest_intact
from unidad_pl.runs.config import build_module, merge_configs, read_config
from unidad_pl.training.rehearsal import Plan

RESULT_FILE, RUNS = "result.json", "runs"
RESULT = ("tflops", "iterations", "values", "floor", "curve", "picture", "commit")
AGAIN = "delete it: the same command makes it again from its run"
EXPORT = "unidad_pl.PretrainedUNet"
_PLANNING = Lock()  # torch's random state and its counting of FLOPs are the whole process's
ENTRIES = {"base", "tflops", "seeds", "validations", "domains", "methods", "quick"}
STAGE_ENTRIES = {"config", "share", "starts", "domain"}


@dataclass(frozen=True)
class Run:
    """One fit.

    Attributes:
        folder: its own; named after what it computes, so that stages which several cells share are run once.
        config: what ``unidad fit`` gets.
        starts: dotted option, a source -> the run whose exported network it becomes.
        tflops: its compute.
        validations: evaluations during the run; the last is at its end.
    """

    folder: Path
    config: Any
    starts: dict[str, Run]
    tflops: float
    validations: int


@dataclass(frozen=True)
class Cell:
    """One method on one domain with one seed; ``run`` is its last fit."""

    method: str
    domain: str
    seed: int
    run: Run

    @property
    def name(self) -> str:
        """``METHOD/DOMAIN/SEED``."""
        return f"{self.method}/{self.domain}/{self.seed}"


def study(
    config: str,
    out: str | None = None,
    only: str = "*",
    cell: int | None = None,
    quick: bool = False,
    parallel: int = 1,
) -> str:
    """Run a grid of (method, domain, seed) at equal compute, and write tables, curves and pictures of its results.

    Every cell is an ordinary run folder. Cells that are done are kept: the same command goes on where it was stopped.

    Args:
        config: a study, such as configs/study/stages.yaml.
        out: its folder; null: studies/NAME.
        only: cells to run, as METHOD/DOMAIN/SEED with * for any.
        cell: run this one alone, counted from 0: for the tasks of a SLURM array.
        quick: with the study's smaller numbers, to see that everything runs.
        parallel: fits at a time; the cores are shared out. On two hyperthreads one fit after the other is faster.

    Returns:
        The table of all cells that are done.

    Raises:
        FileNotFoundError, ValueError: a study that cannot be read, or a pattern that fits no cell.
        RuntimeError: a fit failed; the others are done.
    """
    check_whole(1, parallel=parallel)
    folder = expanded(out or Path("studies") / (Path(config).stem + ("_quick" if quick else "")))
    cells = read_study(expanded(config), folder, quick)
    chosen = [one for one in cells if fnmatch(one.name, only)]
    if cell is not None:
        if only != "*":
            raise ValueError(f"--cell {cell} and --only {only!r} both choose what is run: give one of them")
        check_whole(0, len(cells) - 1, cell=cell)
        chosen = [cells[cell]]
    if not chosen:
        raise ValueError(f"--only {only!r} fits none of the {len(cells)} cells, such as {cells[0].name!r}")
    threads = max(1, (os.cpu_count() or 1) // parallel)
    failed: dict[str, str] = {}

    def work(one: Cell) -> None:
        try:
            carry_out(one.run, threads)
        except (RuntimeError, OSError, ValueError) as error:
            failed[one.name] = sentence_of(error)
        with alone_in(folder):  # or who read the results first could write them last, without the newest cell
            write_results(folder, results(cells))

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(work, chosen))
    if failed:
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in failed.items()))
    return (folder / "README.md").read_text(encoding="utf-8")


def read_study(path: Path, out: Path, quick: bool = False) -> list[Cell]:
    """All cells of a study, method by method.

    Raises:
        FileNotFoundError: it names a config that is not there.
        BrokenFile: it lacks an entry, or has an unknown one.
    """
    content = read_config(path)
    _check_entries(path, content, ENTRIES, ENTRIES - {"quick"})
    smaller = content.pop("quick", {})
    _check_entries(path, smaller, ENTRIES - {"quick"}, set())
    if quick:
        content |= smaller
    _check_sizes(path, content)
    read = cache(lambda name: read_config(path.parent / name))  # the same parts come in many cells
    base = read(content["base"])
    cells = []
    grid = product(content["methods"].items(), content["domains"].items(), content["seeds"])
    for (method, stages), (domain, place), seed in grid:
        runs: list[Run] = []
        for stage in stages if isinstance(stages, list) else [{"config": stages, "share": 1.0}]:
            _check_entries(path, stage, STAGE_ENTRIES, {"config", "share"})
            options = stage["config"] if isinstance(stage["config"], dict) else read(stage["config"])
            merged = merge_configs([base, read(stage.get("domain", place)), options, {"seed_everything": seed}])
            wanted = stage.get("starts", {})
            if unknown := [number for number in wanted.values() if number not in range(1, len(runs) + 1)]:
                raise BrokenFile(f"{str(path)!r}: {method!r} starts from stage {unknown[0]!r}, but there are "
                                 f"{len(runs)} before it: give the number of one, from 1")  # fmt: skip
            starts = {option: runs[number - 1] for option, number in wanted.items()}
            runs.append(_run(out, merged, starts, content["tflops"] * stage["share"], content["validations"]))
        if left := [run for run in runs[:-1] if not any(run in later.starts.values() for later in runs)]:
            raise BrokenFile(f"{str(path)!r}: no stage of {method!r} starts from its stage {runs.index(left[0]) + 1}")
        cells.append(Cell(method, domain, seed, runs[-1]))
    return cells


def _check_sizes(path: Path, content: dict[str, Any]) -> None:
    """Refuse entries that are no grid, or would count a seed twice or an unequal compute as equal."""
    with reading(path, "study", "correct it"):
        check_given(tflops=content["tflops"], validations=content["validations"])
        check_positive(tflops=content["tflops"])
        check_whole(1, validations=content["validations"])
        for name in ("methods", "domains"):
            if not (isinstance(content[name], dict) and content[name]):
                raise ValueError(f"{name} must be names and configs, got {content[name]!r:.80}")
        seeds = content["seeds"]
        if not isinstance(seeds, list) or not seeds or len(set(map(repr, seeds))) < len(seeds):
            raise ValueError(f"seeds must be a list of different whole numbers, got {seeds!r:.80}")
        for seed in seeds:
            check_given(seeds=seed)
            check_whole(0, seeds=seed)
        for method, stages in content["methods"].items():
            if not isinstance(stages, (str, dict)) and not (isinstance(stages, list) and stages):
                raise ValueError(f"the method {method!r} must be a config or a list of stages, got {stages!r:.80}")
            parts = stages if isinstance(stages, list) else [{"share": 1.0}]
            if not all(isinstance(stage, dict) and "share" in stage for stage in parts):
                continue  # which entries a stage must have is said where they are read
            shares: list[Any] = [stage["share"] for stage in parts]
            for share in shares:
                check_given(share=share)
                check_positive(1, share=share)
            if not math.isclose(sum(shares), 1):
                raise ValueError(f"the shares of the stages of {method!r} must add up to 1, got {shares}")


def _check_entries(path: Path, given: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(given, dict) or set(given) - known or needed - set(given):
        seen = sorted(given) if isinstance(given, dict) else given
        raise BrokenFile(f"{str(path)!r}: expected the entries {sorted(needed)}, perhaps {sorted(known - needed)}, "
                         f"got {seen}")  # fmt: skip


def _run(out: Path, config: Any, starts: dict[str, Run], tflops: float, validations: int) -> Run:
    before = {option: run.folder.name for option, run in starts.items()}
    described = json.dumps([config, before, tflops, validations], sort_keys=True)
    folder = out / RUNS / hashlib.sha256(described.encode()).hexdigest()[:12]
    return Run(folder, config, starts, tflops, validations)


def carry_out(run: Run, threads: int) -> dict[str, Any]:
    """Fit a run, and those before it, unless they are done; what came out.

    Raises:
        RuntimeError: the fit failed; names its log.
    """
    before = {one.folder: carry_out(one, threads)["tflops"] for one in run.starts.values()}
    said = f"waits for another process that is at {run.folder}\n"
    with alone_in(run.folder, partial(sys.stderr.write, said)) as lock:
        if (run.folder / RESULT_FILE).is_file():
            return read_result(run.folder / RESULT_FILE)
        starts = {option: _exported(one) for option, one in run.starts.items()}
        with _PLANNING:
            config, iterations = _planned(run, starts)
        every = max(1, iterations // run.validations)
        iterations = every * max(1, iterations // every)
        _fit(run, config, iterations, every, sum(before.values()), threads, lock)
        result = _result(run, iterations)
        with replacing(run.folder / RESULT_FILE) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result


def _exported(run: Run) -> Path:
    """The network of a run that is done. The first who starts from it exports it, others wait and find it there."""
    start = run.folder / "export"
    # In this order, as in carry_out: who has _PLANNING waits for no folder.
    with alone_in(run.folder), _PLANNING:
        if not start.exists():
            export_student(str(_checkpoint(run)), str(start))
    return start


def _planned(run: Run, starts: dict[str, Path]) -> tuple[Any, int]:
    """The config of a run with the networks it starts from, and how many iterations its TFLOPs are enough for."""
    config = run.config
    for option, start in starts.items():
        config = starting_from(str(start), option, config)
    module = build_module(config, str(run.folder))
    plan = Plan(module, int(config["data"]["init_args"]["batch_size"]))
    return config, plan.iterations_within(run.tflops)


def starting_from(path: str, option: str, config: Any) -> Any:
    """``config`` with the network at ``path`` as its dotted ``option``."""
    value: Any = {"class_path": EXPORT, "init_args": {"path": path}}
    for name in reversed(option.split(".")):
        value = {name: value}
    return merge_configs([config, value])


def _fit(run: Run, config: Any, iterations: int, every: int, before: float, threads: int, lock: int) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger",
              "init_args": {"save_dir": str(run.folder), "name": "fit"}}  # fmt: skip
    cost = {"class_path": "unidad_pl.Cost", "init_args": {"before": before}}
    trainer = config["trainer"] | {"max_steps": iterations, "val_check_interval": every, "logger": logger}
    trainer["callbacks"] = [*trainer.get("callbacks", []), cost]
    whole = config | {"trainer": trainer, "summary": False, "threads": threads}
    with replacing(run.folder / "config.json") as part:
        part.write_text(json.dumps(whole, indent=1), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "unidad_pl.cli", "fit", "--config", str(run.folder / "config.json"),
               "--ckpt_path", "auto"]  # fmt: skip
    log = run.folder / "log.txt"
    if launch(command, log, threads, lock):
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the fit failed ({' '.join(last)}): see {log}")


def launch(command: list[str], log: Path, threads: int, lock: int) -> int:
    """Run a command in a process with so many threads, what it prints added to ``log``; its exit code.

    It holds ``lock`` too: where the study alone is killed, the next one waits until the fit, which goes on, has ended.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("a") as file:
        return subprocess.run(
            command, stdout=file, stderr=file, check=False, env=environment, pass_fds=[lock]
        ).returncode


def _checkpoint(run: Run) -> Path:
    path, passed_over = newest_intact(run.folder / "fit")
    if passed_over:
        broken, why = next(iter(passed_over.items()))
        raise BrokenFile(f"the last checkpoint of a stage is damaged ({why}): delete {str(broken)!r} and "
                         f"{RESULT_FILE} beside its fit/, and the same command trains the rest again")  # fmt: skip
    if path is None:
        raise FileNotFoundError(f"no checkpoint in {run.folder / 'fit'}: delete {run.folder} to train again")
    return path


def _result(run: Run, iterations: int) -> dict[str, Any]:
    """The values of every validation by iteration, the last ones, the cost and where it came from."""
    folder = _checkpoint(run).parents[1]
    curve: dict[int, dict[str, float | None]] = {}
    floor: dict[str, float | None] = {}
    measured = folder / METRICS_FILE
    for record in read_records(measured) if measured.is_file() else ():  # there is none where no callback measures
        curve.setdefault(record["step"], {"tflops": record.get("tflops")}).update(record["values"])
        floor |= record.get("floor", {})
    cost = folder / COST_FILE, "cost of a fit", f"delete {str(run.folder)!r} to train again"
    with reading(*cost):
        tflops = float(read_json(*cost, finite=True)["tflops"])
    pictures = sorted((folder / "samples").glob("*.png"))
    return {
        "tflops": tflops, "iterations": iterations, "values": curve[max(curve)] if curve else {}, "floor": floor,
        "curve": [{"step": step, **values} for step, values in sorted(curve.items())],
        "picture": str(pictures[-1].relative_to(run.folder)) if pictures else None,
        "commit": git_commit(Path(__file__).parent),
    }  # fmt: skip


def results(cells: list[Cell]) -> list[dict[str, Any]]:
    """What came out of the cells that are done, in their order."""
    rows = []
    for cell in cells:
        path = cell.run.folder / RESULT_FILE
        if path.is_file():
            run = f"{RUNS}/{cell.run.folder.name}"
            own = {"method": cell.method, "domain": cell.domain, "seed": cell.seed, "run": run}
            rows.append(own | read_result(path))
    return rows


def read_result(path: Path) -> dict[str, Any]:
    """What :func:`carry_out` wrote of a run.

    Raises:
        BrokenFile: it is damaged, or lacks an entry.
    """
    with reading(path, "result of a fit", AGAIN):
        found = read_json(path, "result of a fit", AGAIN)
        return {name: found[name] for name in RESULT}

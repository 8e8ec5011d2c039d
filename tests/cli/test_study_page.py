"""The tables, charts and pictures of a study, of cells that lack something; tasks that share a stage."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.report.folders import evaluation, noise
from unidad_pl.cli import study as module
from unidad_pl.cli.study import RESULT_FILE, Cell, Run, carry_out, read_result, results
from unidad_pl.cli.study_page import write_results
from unidad_pl.files import BrokenFile, alone_in

BOTH = {"fid": 12.0, "intra_lpips_relative": 0.5}


def row(
    method: str, seed: int = 0, curve: list[dict[str, Any]] | None = None, **values: float | None
) -> dict[str, Any]:
    points = [{"step": 4, "tflops": 1.0, **values}] if curve is None else curve
    return {"method": method, "domain": "hats", "seed": seed, "run": f"runs/{method}{seed}", "tflops": 1.0,
            "iterations": 4, "values": values, "floor": {}, "curve": points, "picture": "val.png"}  # fmt: skip


def test_what_cells_lack_is_said_and_the_rest_is_written(tmp_path: Path) -> None:
    rows = [
        row("whole", **BOTH),
        row("no_fid", precision=0.5),
        row("null", fid=None, intra_lpips_relative=0.5),
        row("blind", **BOTH),
        row("blind", 1, **BOTH),
        row("torn", **BOTH),
        row("bare", curve=[]),
        row("gap", curve=[{"step": 2, "tflops": 0.5, "fid": None}, {"step": 4, "tflops": 1.0, **BOTH}], **BOTH),
    ]
    for one in rows:
        noise(tmp_path / one["run"] / "val.png", 8, 40)
    rows[3]["picture"] = None
    (tmp_path / "runs/torn0/val.png").write_bytes(b"\x89PNG")
    (tmp_path / "runs/no_fid0/val.png").unlink()
    write_results(tmp_path, rows)
    assert len(json.loads((tmp_path / "study.json").read_text())) == len(rows)
    page = (tmp_path / "README.md").read_text()
    said = dict(re.findall(r"^- (.*): ([\w/, ]+)$", page.partition("Missing:\n\n")[2], re.MULTILINE))
    assert list(said.values()) == ["no_fid/hats/0, null/hats/0, bare/hats/0",
                                   "no_fid/hats/0, null/hats/0, bare/hats/0, gap/hats/0",
                                   "no_fid/hats/0, blind/hats/0, torn/hats/0"]  # fmt: skip
    assert [next(iter(re.findall(r"quality.png|curves.png|no picture", one))) for one in said] == [
        "quality.png", "curves.png", "no picture"]  # fmt: skip
    assert "| whole | 1 | 1.0 | 12.0 |" in page
    assert "| bare | 1 | 1.0 | - |" in page
    with Image.open(tmp_path / "pictures_hats.png") as picture:
        assert picture.height == 12 * 5  # whole, null, blind (its second seed), bare, gap
    assert (tmp_path / "quality.png").is_file()
    assert (tmp_path / "curves.png").is_file()
    write_results(tmp_path, rows[:1])
    assert "Missing" not in (tmp_path / "README.md").read_text()


def made(folder: Path) -> Run:
    """A run that a fit has just ended."""
    run, place = Run(folder, {}, {}, 1.0, 1), folder / "fit" / "version_0"
    place.mkdir(parents=True)
    (place / "cost.json").write_text('{"tflops": 0.75}')
    return run


def test_a_fit_without_metrics_has_a_result_and_odd_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path / "run")
    place = run.folder / "fit" / "version_0"
    monkeypatch.setattr(module, "_checkpoint", lambda run: place / "checkpoints" / "last.ckpt")
    found = module._result(run, 4)
    assert (found["values"], found["curve"], found["picture"], found["tflops"]) == ({}, [], None, 0.75)
    lines = [json.dumps(evaluation(2, 5.0)), json.dumps(evaluation(4, 3.0) | {"tflops": None})]
    (place / "metrics.jsonl").write_text("\n".join(lines) + '\n{"st')  # killed, and not gone on with
    found = module._result(run, 4)
    assert [(one["step"], one["tflops"], one["fid"]) for one in found["curve"]] == [(2, 0.5, 5.0), (4, None, 3.0)]
    (place / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1].replace('"step": 4', '"step": "4"') + "\n")
    with pytest.raises(BrokenFile, match=r"metrics\.jsonl': line 2 cannot be used \(its entry 'step' is '4'"):
        module._result(run, 4)
    (place / "metrics.jsonl").unlink()
    for odd in ("{}", '{"tflops": NaN}', f'{{"tflops": {"9" * 400}}}'):
        (place / "cost.json").write_text(odd)
        with pytest.raises(BrokenFile, match=r"cost\.json' is no readable .*delete '.*run' to train again"):
            module._result(run, 4)
    (run.folder / RESULT_FILE).write_text('{"tflops": 1}')
    with pytest.raises(BrokenFile, match=r"result\.json' is no readable result of a fit .*'iterations'.*delete it"):
        results([Cell("joint", "hats", 0, run)])


FORK = multiprocessing.get_context("fork")


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Two runs that start from one stage, which is done; exporting it takes half a second, and fails beside another."""
    result = {"tflops": 1.0, "iterations": 1, "values": {}, "floor": {}, "curve": [], "picture": None, "commit": ""}
    stage = Run(tmp_path / "stage", {}, {}, 1.0, 1)
    stage.folder.mkdir()
    (stage.folder / RESULT_FILE).write_text(json.dumps(result))

    def export(checkpoint: str, out: str) -> None:
        Path(f"{out}.part").mkdir()
        with (tmp_path / "exports").open("a") as file:
            file.write("one\n")
        time.sleep(0.5)
        Path(f"{out}.part").rename(out)

    monkeypatch.setattr(module, "export_student", export)
    for name, stub in {"_checkpoint": lambda run: run.folder, "_planned": lambda *given: ({}, 1),
                       "_fit": lambda *given: None, "_result": lambda *given: result}.items():  # fmt: skip
        monkeypatch.setattr(module, name, stub)
    return [Run(tmp_path / name, {}, {"model.init_args.source": stage}, 1.0, 1) for name in ("a", "b")]


def test_tasks_that_share_a_stage_export_it_once(two: list[Run], tmp_path: Path) -> None:
    tasks = [FORK.Process(target=carry_out, args=(run, 1)) for run in two]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(20)
    assert [task.exitcode for task in tasks] == [0, 0]
    assert all(read_result(run.folder / RESULT_FILE) for run in two)
    assert (tmp_path / "exports").read_text() == "one\n"
    assert (tmp_path / "stage" / "export").is_dir()


def test_a_task_that_is_killed_while_it_exports_holds_up_nobody(two: list[Run], tmp_path: Path) -> None:
    task = FORK.Process(target=carry_out, args=(two[0], 1))
    task.start()
    while not (tmp_path / "exports").is_file():
        time.sleep(0.01)
    assert task.pid is not None
    os.kill(task.pid, signal.SIGKILL)
    task.join(20)
    (tmp_path / "stage" / "export.part").rmdir()
    begun = time.monotonic()
    for run in two:
        carry_out(run, 1)
    assert time.monotonic() - begun < 10
    assert (tmp_path / "exports").read_text() == "one\n" * 2


def test_of_tasks_that_end_together_the_last_table_has_all(two: list[Run], tmp_path: Path, monkeypatch: Any) -> None:
    """Who reads the results first must not write them last."""
    cells = [Cell(run.folder.name, "hats", 0, run) for run in two]
    monkeypatch.setattr(module, "read_study", lambda *given: cells)

    def write(folder: Path, rows: list[dict[str, Any]]) -> None:
        time.sleep(0.4 / len(rows))  # who knows less is the slower one
        (folder / "README.md").write_text(str(len(rows)))

    monkeypatch.setattr(module, "write_results", write)
    tasks = [FORK.Process(target=module.study, args=("study.yaml", str(tmp_path)), kwargs={"cell": i}) for i in (0, 1)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(20)
    assert (tmp_path / "README.md").read_text() == "2"


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(OSError, match=r"has no locks .*by which processes share it: choose a folder"),
        alone_in(tmp_path),
    ):
        pass

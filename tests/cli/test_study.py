"""`unidad study`: a small grid of one and two stages, stopped and gone on with, its table and pictures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.worlds import nested
from unidad_pl import Diffusion, UniDAD
from unidad_pl.cli import study as module
from unidad_pl.cli.main import main
from unidad_pl.cli.study import launch, read_study, starting_from, study
from unidad_pl.cli.study_page import spread
from unidad_pl.files import BrokenFile, alone_in
from unidad_pl.runs.config import build_module

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "study"
SHIPPED = CONFIGS / "stages.yaml"
SHAPE = {
    "resolution": 16,
    "channels": [8],
    "attention_levels": [],
    "layers": 1,
    "head_channels": 8,
    "norm_groups": 4,
}
SOURCE = {"class_path": "unidad_pl.NewUNet", "init_args": SHAPE}
BASE = {
    "model": {"class_path": "unidad_pl.UniDAD", "init_args": {"source": SOURCE, **nested(student__num_steps=2)}},
    "data": {"class_path": "unidad_pl.FewShotDataModule",
             "init_args": {"shots": 2, "resolution": 16, "batch_size": 2, "evaluation": {"val_samples": 6}}},
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
}  # fmt: skip
JUDGES = [
    {"class_path": "unidad_pl.SampleGrid", "init_args": {"count": 4, "columns": 4, "shots_on_top": False}},
    {"class_path": "unidad_pl.FID", "init_args": {"features": {"class_path": "unidad_pl.CartoonFeatures"}}},
    {"class_path": "unidad_pl.FactorDistance", "init_args": {"factors": ["tilt", "skin"]}},
]
FILES: dict[str, Any] = {
    "base": BASE,
    "hats": {"data": {"init_args": {"root": "builtin:sunglasses", "reference": {"root": "builtin:sunglasses:12"}}},
             "trainer": {"callbacks": JUDGES}},
    "adapt": {"model": {"class_path": "unidad_pl.Diffusion",
                        "init_args": {"source": SOURCE, "sampling": {"sampler": "few_step", "num_steps": 2}}}},
    "joint": {},
}  # fmt: skip
STUDY = {
    "base": "base.yaml", "tflops": 0.0004, "validations": 1, "seeds": [0], "domains": {"hats": "hats.yaml"},
    "methods": {"joint": "joint.yaml", "two stages": [
        {"config": "adapt.yaml", "share": 0.5},
        {"config": {"model": {"init_args": {"target_teacher": None}}}, "share": 0.5,
         "starts": {"model.init_args.source": 1}}]},
    "quick": {"tflops": 0.0001},
}  # fmt: skip


OTHER_NUMBERS = {"Uni-DAD, a = .25", "Uni-DAD, a = .5", "K = 2", "K = 3", "K = 4", "5 shots", "r = 1", "r = 5", "hinge"}
"""Methods of which another one has the same options."""
HALF = {"config": "joint.yaml", "share": 0.5}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study, whose fits run in this process: importing everything takes longer than they do."""
    for name, content in {**FILES, "study": STUDY}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def in_this_process(command: list[str], log: Path, threads: int, lock: int) -> int:
        assert threads == (os.cpu_count() or 1)
        main([*command[3:], "--threads", "1"])
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "launch", in_this_process)
    return tmp_path


@pytest.mark.ci
def test_a_grid_at_equal_compute_that_goes_on_where_it_stopped(place: Path) -> None:
    assert "| joint | 1 | 0.0 |" in study("study.yaml", "out", only="joint/*")
    first = json.loads((place / "out" / "study.json").read_text())
    table = study("study.yaml", "out")
    rows = json.loads((place / "out" / "study.json").read_text())
    assert rows[0] == first[0]  # not run again
    assert [row["method"] for row in rows] == ["joint", "two stages"]
    assert "two stages" in table
    assert "| hats, factors | seeds | tilt | skin |" in table
    assert "| two halves |" in table
    assert "diversity" not in table  # no callback measures it
    for row in rows:
        assert row["tflops"] <= STUDY["tflops"]
        assert row["tflops"] > 0.6 * STUDY["tflops"]
        assert row["values"]["fid"] > 0
        assert row["curve"][-1]["tflops"] == row["tflops"]
    for name in ("quality.png", "curves.png", "pictures_hats.png"):
        with Image.open(place / "out" / name) as picture:
            assert picture.width > 300


def test_a_network_that_is_adapted_and_one_that_is_distilled_meet_in_a_third_stage() -> None:
    cell = next(cell for cell in read_study(SHIPPED, Path("out")) if cell.method.startswith("pre-distilled"))
    assert set(cell.run.starts) == {"model.init_args.student.init_from", "model.init_args.target_teacher.init_from"}
    parts = {run.folder: run.tflops for run in (cell.run, *cell.run.starts.values())}
    assert len(parts) == 3
    assert sum(parts.values()) == pytest.approx(yaml.safe_load(SHIPPED.read_text())["tflops"])


def test_stages_that_cells_share_are_run_once_and_names_are_their_content() -> None:
    cells = read_study(SHIPPED, Path("out"))
    assert len(cells) == len({cell.name for cell in cells})
    two = [cell.run for cell in cells if cell.method == "distil, then adapt"]
    distilled = {before.folder for run in two for before in run.starts.values()}
    assert len(distilled) == 3  # one for each seed, whatever the domain
    assert read_study(SHIPPED, Path("out"), quick=True)[0].run.tflops < cells[0].run.tflops
    assert read_study(SHIPPED, Path("out")) == cells


def test_every_method_of_the_shipped_studies_can_be_built() -> None:
    studies = [path for path in CONFIGS.glob("*.yaml") if "methods" in yaml.safe_load(path.read_text())]
    assert {path.stem for path in studies} == {"stages", "ablations", "heads", "gradient"}
    cells = [cell for path in studies for cell in read_study(path, Path("out"))]
    for cell in {cell.method: cell for cell in cells if cell.method not in OTHER_NUMBERS}.values():
        for run in (cell.run, *cell.run.starts.values()):
            config = run.config
            for option in run.starts:
                config = starting_from("builtin:cartoon_teacher", option, config)
            assert isinstance(build_module(config, cell.name), (UniDAD, Diffusion)), cell.name
            judges = {judge["class_path"].split(".")[-1] for judge in run.config["trainer"]["callbacks"]}
            assert judges - {"AttributeShare"} == {"SampleGrid", "FID", "IntraLPIPS", "FactorDistance"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 3}, r"expected the entries .*got .*'budget'"), ({"tflops": -1}, "tflops must be"),
        ({"methods": {"a": [{"config": "joint.yaml"}]}}, r"expected the entries .*'share'"),
        ({"methods": {"a": [HALF, HALF]}}, r"no stage of 'a' starts from its stage 1"),
        ({"methods": {"a": [HALF | {"share": 1.0, "starts": {"model.init_args.source": 1}}]}},
         "from stage 1, but there are 0"),
        ({"seeds": []}, "seeds must be a list of different"), ({"seeds": [0, 0]}, "seeds must be .* got .0, 0."),
        ({"seeds": 3}, "seeds must be"), ({"seeds": [None]}, "seeds must be given"),
        ({"domains": {}}, "domains must be"),
        ({"methods": ["a"]}, "methods must be names"), ({"tflops": None}, "tflops must be given"),
        ({"methods": {"a": None}}, "the method 'a' must be a config"), ({"methods": {"a": []}}, "'a' must be a config"),
        ({"methods": {"a": [HALF]}}, "the shares of the stages of 'a' must add up to 1, got .0.5"),
        ({"methods": {"a": [HALF | {"share": 3}]}}, "share must be"),
        ({"base": "nowhere.yaml"}, "nowhere"), ({"quick": {"tflop": 1}}, r"got \['tflop'\]"),
    ],
)  # fmt: skip
def test_what_is_no_study_is_refused(change: dict[str, Any], message: str, place: Path) -> None:
    (place / "study.yaml").write_text(yaml.safe_dump(STUDY | change))
    with pytest.raises((BrokenFile, ValueError, FileNotFoundError), match=message):
        study("study.yaml", "out")


def test_cells_that_are_not_there_and_fits_that_fail(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"fits none of the 2 cells, such as 'joint/hats/0'"):
        study("study.yaml", "out", only="other/*")
    with pytest.raises(ValueError, match="cell must be"):
        study("study.yaml", "out", cell=2)
    with pytest.raises(ValueError, match=r"--cell 0 and --only 'joint/\*' both choose"):
        study("study.yaml", "out", cell=0, only="joint/*")

    def fails(command: list[str], log: Path, threads: int, lock: int) -> int:
        return launch([sys.executable, "-c", f"import os; print(os.environ['OMP_NUM_THREADS'], {threads}); exit(3)"],
                      log, threads, lock)  # fmt: skip

    monkeypatch.setattr(module, "launch", fails)
    cores = os.cpu_count() or 1
    with pytest.raises(RuntimeError, match=rf"joint/hats/0: the fit failed \({cores} {cores}\): see .*log\.txt"):
        study("study.yaml", "out", cell=0)


def test_the_fit_of_a_killed_study_goes_on_and_the_next_study_waits_for_it(tmp_path: Path) -> None:
    fit = "import pathlib, time; pathlib.Path('begun').touch(); time.sleep(1.5); pathlib.Path('done').touch()"
    of_it = (
        "import sys\nfrom pathlib import Path\nfrom unidad_pl.cli.study import launch\n"
        "from unidad_pl.files import alone_in\n"
        f"with alone_in(Path('run')) as lock: launch([sys.executable, '-c', {fit!r}], Path('log.txt'), 1, lock)"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", of_it], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(CONFIGS.parents[1])}
    )
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < until:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    waited: list[bool] = []
    with alone_in(tmp_path / "run", lambda: waited.append((tmp_path / "done").exists())):
        assert waited == [False]
        assert (tmp_path / "done").exists()
        again: list[None] = []
        with alone_in(tmp_path / "other", lambda: again.append(None)):
            assert not again  # a free folder is nothing to wait for


def test_a_damaged_checkpoint_of_a_stage_is_named(place: Path) -> None:
    """An older one beside it is whole, and is not taken instead: the stage would have had less compute."""
    study("study.yaml", "out", only="two stages/*")
    (cell,) = [cell for cell in read_study(Path("study.yaml"), Path("out")) if cell.method == "two stages"]
    (stage,) = cell.run.starts.values()
    newest = next((stage.folder / "fit").rglob("*.ckpt"))
    shutil.copyfile(newest, newest.with_name("older.ckpt"))
    os.utime(newest.with_name("older.ckpt"), (0, 0))
    newest.write_bytes(newest.read_bytes()[:-100])
    shutil.rmtree(stage.folder / "export")
    (cell.run.folder / "result.json").unlink()
    said = rf"two stages/hats/0: the last checkpoint of a stage is damaged .*delete '.*{newest.name}' and result\.json"
    with pytest.raises(RuntimeError, match=said):
        study("study.yaml", "out", only="two stages/*")
    assert not (stage.folder / "export").exists()
    assert "joint" not in (place / "out" / "README.md").read_text()  # the table of what is left is written
    newest.unlink()  # the way out that the sentence names
    (stage.folder / "result.json").unlink()
    assert "| two stages | 1 |" in study("study.yaml", "out", only="two stages/*")


def test_spreads() -> None:
    assert spread([1.0, 3.0], decimals=1) == "2.0 ± 1.4"
    assert spread([None, 0.25], 100, 0) == "25"

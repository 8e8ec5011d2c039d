"""A config as its difference from the defaults."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from tests.test_docs import ROOT
from unidad_pl.cli.main import main
from unidad_pl.report.difference import REQUIRED, differences_from_defaults
from unidad_pl.report.folder import Run
from unidad_pl.report.page import config_rows
from unidad_pl.runs.config import LOGGER


def model(**options: object) -> dict[str, object]:
    return {"model": {"class_path": "unidad_pl.UniDAD", "init_args": options}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"student": {"num_steps": 3, "update_every": 5}}, {}),
        ({"student": {"num_steps": 2}}, {"model.student.num_steps": (2, 3)}),
        ({"student": {"optimizer": {"lr": 0.5}}}, {"model.student.optimizer.lr": (0.5, 2e-6)}),
        ({"matching": {"range": [0.02, 0.5]}}, {"model.matching.range": ([0.02, 0.5], (0.02, 0.98))}),
        ({"gan": {"r1": 1.0}, "memory": {"checkpointing": "none"}}, {"model.gan.r1": (1.0, 0.0)}),
    ],
)
def test_options_of_groups(options: dict[str, object], expected: dict[str, object]) -> None:
    found = differences_from_defaults(model(**options), {})
    assert found.pop("model")[0] == "UniDAD"
    assert {name: tuple(map(str, pair)) for name, pair in found.items()} == {
        name: tuple(map(str, pair)) for name, pair in expected.items()
    }


def test_a_group_that_is_off_and_one_that_is_on() -> None:
    found = differences_from_defaults(model(gan=None, target_teacher={"adaptation": {"pretrain": 7}}), {})
    assert found["model.gan"][0] is None
    assert found["model.target_teacher.adaptation.pretrain"] == (7, 0)


def test_callbacks_are_named_and_their_options_compared() -> None:
    callbacks = [
        {"class_path": "unidad_pl.IntraLPIPS", "init_args": {"relative": True, "batch_size": 8, "stages": ["val"]}}
    ]
    found = differences_from_defaults({"trainer": {"callbacks": callbacks, "max_steps": 5, "num_nodes": 1}}, {})
    assert found["trainer.callbacks.IntraLPIPS.relative"] == (True, False)
    assert "trainer.callbacks.IntraLPIPS.batch_size" not in found
    assert found["trainer.callbacks.IntraLPIPS.stages"][0] == ["val"]  # an option of its base
    assert found["trainer.max_steps"] == (5, -1)
    assert "trainer.num_nodes" not in found


def test_of_the_own_logger_only_its_place_is_listed() -> None:
    logger = {"class_path": LOGGER["class_path"], "init_args": {"save_dir": "runs", "name": "x", "comment": ""}}
    found = differences_from_defaults({"trainer": {"logger": logger}}, {})
    assert {name: value for name, (value, _) in found.items()} == {
        "trainer.logger.save_dir": "runs",
        "trainer.logger.name": "x",
    }


def test_a_class_of_others_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb_of_report.py").write_text("raise SystemExit(3)\nclass Bomb: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {"model": {"class_path": "bomb_of_report.Bomb", "init_args": {"size": 3}}}
    found = differences_from_defaults(config, {})
    assert found == {"model": ("Bomb", REQUIRED), "model.size": (3, REQUIRED)}
    assert "bomb_of_report" not in sys.modules


@pytest.mark.slow  # the whole config of a run, as the command writes it
def test_what_a_config_sets_is_what_differs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--print_config"])
    run = Run(tmp_path, "run", yaml.safe_load(capsys.readouterr().out))
    rows = {name: values[0] for name, values, _ in config_rows([run])}
    assert rows["model.student.sigma_min"] == "0.3"
    assert rows["trainer.max_steps"] == "1050"
    assert rows["checkpoint.every_n_train_steps"] == "100"
    assert not {"trainer.devices", "trainer.logger", "checkpoint.save_last", "model.student.num_steps"} & set(rows)

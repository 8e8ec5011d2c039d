"""The words of a fit: its networks; the last validation is not computed again, nothing is named that is not there."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tests.metrics.toys import TinyFeatures
from tests.runs.test_resume import fit
from tests.worlds import unidad
from unidad_pl import FID, Diffusion, PretrainedUNet
from unidad_pl.cli.lightning import run
from unidad_pl.cli.summary import NetworkTable, _notes, fit_summary
from unidad_pl.metrics.features import InceptionFeatures

VALIDATING = ("--trainer.limit_val_batches", "1", "--trainer.check_val_every_n_epoch", "null")


class Brightness(pl.Callback):
    """Logs a metric, and lists the steps it was computed at."""

    seen: list[int]

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.values: list[Tensor] = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["samples"].mean())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            Brightness.seen.append(pl_module.iteration)
        pl_module.log("val/brightness", sum(self.values) / len(self.values))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "my runs; here's"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    Brightness.seen = []
    return place


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "steps"), [(2, [2, 4]), (3, [3, 4])])
@pytest.mark.parametrize("before", [True, False])
def test_the_last_validation_is_computed_once_and_the_first_on_request(
    interval: int, steps: list[int], before: bool, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--trainer.callbacks+", "tests.cli.test_summary.Brightness", "--evaluate_before", str(before).lower())
    cli = fit(4, *VALIDATING, "--trainer.val_check_interval", str(interval), *own)
    assert Brightness.seen == ([0, *steps] if before else steps)
    printed = capsys.readouterr().out
    assert ("before" in printed) == before
    row = next(line for line in printed.splitlines() if "val/brightness" in line)
    again = cli.trainer.validate(cli.model, cli.datamodule, verbose=False)[0]["val/brightness"]
    assert f"{again:.4g}" in row


def test_a_resumed_run_still_knows_its_first_numbers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = (*VALIDATING, "--trainer.callbacks+", "tests.cli.test_summary.Brightness", "--evaluate_before", "true",
           "--model.student.optimizer.lr", "0.1")  # fmt: skip

    def numbers(steps: int, *options: str) -> list[str]:
        fit(steps, *own, *options)
        row = next(line for line in capsys.readouterr().out.splitlines() if "val/brightness" in line)
        return re.findall(r"[\d.]+", row)

    before, after = numbers(2)
    assert before != after
    assert numbers(3, "--ckpt_path", "last")[:-1] == [before]
    assert Brightness.seen == [0, 2, 3]  # the untrained weights are not there any more


@pytest.mark.parametrize("own", [True, False])
def test_a_reference_of_shots_is_said(own: bool, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = SimpleNamespace(reference_is_shots=own)
    trainer: Any = SimpleNamespace(global_step=2, datamodule=data, fast_dev_run=False, checkpoint_callback=None,
                                   lightning_module=None, callbacks=[])  # fmt: skip
    fit_summary(trainer, here, None, {"val/fid": 1.0})
    assert ("the shots themselves" in " ".join(capsys.readouterr().out.split())) == own


def test_commands_are_quoted_for_a_shell(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"save_dir": str(here / "runs"), "name": "tiny"}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": arguments}
    unet = {"class_path": "unidad_pl.NewUNet",
            "init_args": {"resolution": 16, "channels": [16], "attention_levels": [], "head_channels": 8}}  # fmt: skip
    fit(2, "--trainer.logger", json.dumps([logger]), "--model.source", json.dumps(unet))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    words = shlex.split(lines["next"])
    assert words[words.index("--config") + 1] == str(here / "runs/tiny/version_0/config.yaml")
    assert Path(words[words.index("--ckpt_path") + 1]).is_file()
    assert shlex.split(lines["hand"])[-1] == str(here / "runs/tiny/version_0/export")


def test_paths_are_quoted_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(2)
    lines = {line[:13].strip(): line[14:] for line in capsys.readouterr().out.splitlines()}
    (folder,), (checkpoint,) = (shlex.split(lines[name]) for name in ("run folder", "checkpoint"))
    assert Path(folder, "config.yaml").is_file()
    assert Path(checkpoint).is_file()
    assert shlex.split(lines["look"])[1:] == ["demo", "--model", checkpoint]
    assert shlex.split(lines["measure"])[-1] == checkpoint


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_evaluations_say_where_their_files_are(stage: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(2)
    for summary, said in ((True, ["run folder"]), (False, [])):
        capsys.readouterr()
        run([
            stage, "--config", "config.yaml", "--ckpt_path", "last", "--data.evaluation.test_samples", "2",
            "--trainer.limit_val_batches", "1", "--summary", str(summary).lower(),
        ])  # fmt: skip
        lines = {line[:13].strip(): line[14:] for line in capsys.readouterr().out.splitlines()}
        assert [name for name in ("run folder", "checkpoint") if name in lines] == said
        if summary:
            (folder,) = shlex.split(lines["run folder"])
            assert Path(folder, "config.yaml").is_file()
            assert folder != "runs/tiny/version_0"


def test_brackets_and_colons_are_printed_as_they_are(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To rich they would be markup and emoji, if it were let."""
    monkeypatch.setattr("unidad_pl.cli.summary.can_write", lambda: False)  # without the extra
    arguments = {"save_dir": str(here / "[red]" / ":bomb:"), "name": "tiny"}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": arguments}
    fit(2, "--trainer.logger", json.dumps([logger]))
    lines = {line[:13].strip(): line[14:] for line in capsys.readouterr().out.splitlines()}
    (folder,) = shlex.split(lines["run folder"])
    assert Path(folder) == here / "[red]" / ":bomb:" / "tiny" / "version_0"
    assert lines["report"].startswith(f"{shlex.quote(sys.executable)} -m pip install 'unidad_pl[report]' && ")
    assert "hand on" not in lines  # the test's own network has no pipeline to be exported as


def rows(module: pl.LightningModule, capsys: pytest.CaptureFixture[str], **trainer: Any) -> dict[str, list[str]]:
    """Network -> its other cells, of the table that a fit begins with; and the caption's words."""
    settings: dict[str, Any] = dict(is_global_zero=True, precision="32-true", world_size=1, ckpt_path=None)
    NetworkTable().on_fit_start(SimpleNamespace(**settings | trainer), module)  # type: ignore[arg-type]
    cells = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    return {row[0]: row[1:] for row in cells}


def test_the_networks_of_unidad(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = unidad(
        target_teacher__adaptation__pretrain=3, target_teacher__adaptation__until=5, memory__teacher_dtype="bfloat16"
    )
    module.configure_model()
    found = rows(module, capsys, ckpt_path="runs/last.ckpt", world_size=2)
    count = f"{sum(p.numel() for p in module.student.parameters()) / 1000:.2f} K"
    heads = str(sum(p.numel() for p in module.discriminator.parameters()))
    origin = type(module.source).__name__
    assert found["source teacher S"][1] == "no"
    assert found["source teacher S"][2].startswith("bfloat16")
    assert found["target teacher T"] == [count, "yes, until 5", "float32", "cpu", origin]
    assert found["fake score F"] == [count, "yes", "float32", "cpu", "T at 3"] == found["student G"]
    assert found["heads on F"] == [heads, "yes", "float32", "cpu", "random weights"]
    assert found["average"] == [count, "no", "float32", "cpu", "student G"]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    caption = next(name for name in found if "parameters trained" in name)
    assert caption.startswith(f"{trained / 1000:.2f} K of ")
    assert caption.endswith("precision 32-true, 2 processes, trained weights from runs/last.ckpt")


def test_the_networks_of_others(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = Diffusion(PretrainedUNet("builtin:cartoon_teacher"))
    plain.configure_model()
    assert rows(plain, capsys)["denoiser"] == ["2.23 M", "yes", "float32", "cpu", "builtin:cartoon_teacher"]
    other = pl.LightningModule()
    other.net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1).requires_grad_(False))
    other.loss = torch.nn.MSELoss()
    found = rows(other, capsys)
    assert found["net"] == ["13", "9", "float32", "cpu"]
    assert "loss" not in found


def test_a_fast_dev_run_writes_nothing_and_names_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.listdir(here)
    own = ("--trainer.callbacks+", "unidad_pl.SampleGrid", "--trainer.callbacks+", "unidad_pl.SoundCheckpoint",
           "--trainer.callbacks.save_last", "true", "--trainer.callbacks+", "tests.cli.test_summary.Brightness",
           "--evaluate_before", "true")  # fmt: skip
    fit(4, *VALIDATING, "--trainer.fast_dev_run", "true", *own)
    assert Brightness.seen == [1]  # not of the untrained weights, which would take as long as in a run
    assert sorted(os.listdir(here)) == sorted([*before, "config.yaml"])  # which the test wrote
    printed = capsys.readouterr().out
    assert "a fast_dev_run writes nothing" in printed
    assert "checkpoint " not in printed


def test_the_table_says_what_its_names_do_not() -> None:
    callbacks = [FID(TinyFeatures(), name="mine"), FID(InceptionFeatures())]
    trainer = SimpleNamespace(callbacks=callbacks, datamodule=SimpleNamespace(reference_is_shots=True))
    assert _notes(trainer) == [
        "the reference of the metrics is the shots themselves",
        "mine: the Frechet distance in features of tiny, no FID of Inception's",
    ]

"""`--ckpt_path last` and `auto`, as a user runs them: the newest intact checkpoint, in the same log folder."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from tests.worlds import nested, weights_sha
from unidad_pl.cli.lightning import UnidadCLI, run
from unidad_pl.cli.main import main
from unidad_pl.runs.resume import _keep_rows, find_checkpoint
from unidad_pl.strategies import ManualDDPStrategy

CONFIG: dict[str, Any] = {
    "model": {
        "class_path": "unidad_pl.modules.UniDAD",
        "init_args": {
            "source": {"class_path": "tests.worlds.Layers"},
            **nested(student__update_every=2, target_teacher__weight=0.5, training__ema_decay=0.9),
        },
    },
    "data": {"class_path": "unidad_pl.data.FewShotDataModule",
             "init_args": {"root": "builtin:sunglasses", "resolution": 16, "batch_size": 2,
                           "evaluation": {"val_samples": 2}}},
    "trainer": {
        "accelerator": "cpu", "max_epochs": -1, "limit_val_batches": 0, "log_every_n_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False,
        "logger": [
            {"class_path": "lightning.pytorch.loggers.CSVLogger",
             "init_args": {"save_dir": "runs", "name": "tiny", "flush_logs_every_n_steps": 1}},
            {"class_path": "lightning.pytorch.loggers.TensorBoardLogger",
             "init_args": {"save_dir": "runs", "name": "tiny"}},
        ],
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                       "init_args": {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}}],
    },
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("runs/tiny/version_0/checkpoints")


def fit(steps: int, *options: str) -> UnidadCLI:
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    return run(["fit", "--config", "config.yaml", "--trainer.max_steps", str(steps), *options])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        fit(4)
        assert sorted(path.name for path in FOLDER.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    return place


@pytest.fixture
def four(first: Path, here: None) -> Path:
    """A run of four iterations, with checkpoints of the second and the fourth."""
    shutil.copytree(first, ".", dirs_exist_ok=True)
    return FOLDER


def test_last_goes_on_in_the_same_folder_with_the_same_numbers(four: Path) -> None:
    assert b"sha256:" in (four / "step=4.ckpt").read_bytes()[-80:]
    resumed = fit(6, "--ckpt_path", "last")
    assert os.listdir("runs/tiny") == ["version_0"]
    assert yaml.safe_load(Path("runs/tiny/version_0/config.yaml").read_text())["ckpt_path"] is None
    assert (four / "step=6.ckpt").is_file()
    rows = csv.DictReader(Path("runs/tiny/version_0/metrics.csv").read_text().splitlines())
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4, 5]
    whole = fit(6, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.callbacks", "[]")
    assert weights_sha(resumed.model) == weights_sha(whole.model)


@pytest.mark.slow
def test_last_passes_over_damaged_checkpoints_and_says_so(four: Path) -> None:
    os.truncate(four / "step=4.ckpt", 5000)
    with pytest.warns(UserWarning, match=r"passes over.*step=4\.ckpt' is damaged"):
        resumed = fit(3, "--ckpt_path", "last")
    assert resumed.config_init["fit"]["ckpt_path"] == str(four / "step=2.ckpt")
    assert resumed.trainer.global_step == 3
    with pytest.raises(ValueError, match=r"step=4\.ckpt' is damaged.*newest intact one.*step=2\.ckpt"):
        fit(3, "--ckpt_path", str(four / "step=4.ckpt"))
    for path in four.iterdir():
        os.truncate(path, 1000)
    none_left = pytest.raises(FileNotFoundError, match=r"no intact .* 'runs/tiny' \(2 damaged")
    with pytest.warns(UserWarning, match="passes over"), none_left:
        fit(3, "--ckpt_path", "last")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data.augmentation.shift", "1"), "shift was 0 and is now 1"),
        (("--data.augmentation.flip", "false"), "flip was True and is now False"),
        (("--data.root", "builtin:cats"), "shots was '.*' and is now '.*'"),
        (("--model.student.num_steps", "2"), "num_steps was 3 and is now 2"),
    ],
)
def test_other_data_and_other_options_are_refused(four: Path, options: tuple[str, str], message: str) -> None:
    kept = {name: (four.parent / name).read_bytes() for name in ("config.yaml", "environment.jsonl", "metrics.csv")}
    with pytest.raises(RuntimeError, match=message):
        fit(6, "--ckpt_path", "last", *options)
    assert {name: (four.parent / name).read_bytes() for name in kept} == kept
    assert os.listdir("runs/tiny") == ["version_0"]


def test_a_resume_that_is_refused_leaves_no_file_of_tensorboard(four: Path) -> None:
    (four.parent / "events.out.tfevents.1.host.1.0").write_bytes(b"of the start before")
    before = {path: path.read_bytes() for path in four.parent.rglob("*") if path.is_file()}
    logger = (
        "--trainer.logger",
        "TensorBoardLogger",
        "--trainer.logger.save_dir",
        "runs",
        "--trainer.logger.name",
        "tiny",
    )
    with pytest.raises(RuntimeError, match="num_steps was 3 and is now 2"):
        fit(6, "--ckpt_path", "last", *logger, "--model.student.num_steps", "2")
    assert {path: path.read_bytes() for path in four.parent.rglob("*") if path.is_file()} == before


def test_last_of_a_runs_own_config_is_that_runs(four: Path) -> None:
    """A later run of the same name is newer, and has gone further."""
    shutil.copytree(four.parent, "runs/tiny/version_1")
    later = torch.load("runs/tiny/version_1/checkpoints/step=4.ckpt", weights_only=True) | {"global_step": 5}
    torch.save(later, "runs/tiny/version_1/checkpoints/step=5.ckpt")
    own = [str(four.parent / "config.yaml")]
    trainer: Any = pl.Trainer(logger=CSVLogger("runs", "tiny"), accelerator="cpu", enable_model_summary=False)
    assert find_checkpoint(trainer, "last", own) == str(four / "step=4.ckpt")
    assert str(find_checkpoint(trainer, "last", ["config.yaml"])).endswith("version_1/checkpoints/step=5.ckpt")
    command = ["fit", "--config", *own, "--ckpt_path", "last", "--trainer.max_steps", "5"]
    assert run(command).config_init["fit"]["ckpt_path"] == str(four / "step=4.ckpt")
    starts = (four.parent / "environment.jsonl").read_text().splitlines()
    assert len(starts) == 2
    shutil.rmtree(four)
    with pytest.raises(FileNotFoundError, match=r"no intact checkpoint in 'runs/tiny/version_0'"):
        find_checkpoint(trainer, "last", own)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data.resolution", "8"), r"serves images of \(3, 8, 8\), but the model works on \(3, 16, 16\)"),
        (("--trainer.strategy", "ddp"), "unidad_ddp"),
        (("--trainer.gradient_clip_val", "1"), "clip"),
    ],
)
def test_a_fit_that_is_refused_evaluates_nothing_and_leaves_no_folder(options: tuple[str, str], message: str) -> None:
    validating = ("--trainer.limit_val_batches", "1", "--trainer.callbacks+", "unidad_pl.SampleGrid")
    with pytest.raises((RuntimeError, ValueError), match=message):
        fit(2, *validating, "--evaluate_before", "true", *options)
    assert not list(Path().rglob("version_*"))


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_auto_begins_where_there_is_nothing_and_goes_on_with_another_batch_size() -> None:
    assert fit(2, "--ckpt_path", "auto").config_init["fit"]["ckpt_path"] is None
    again = fit(3, "--ckpt_path", "auto", "--data.batch_size", "3")
    assert again.config_init["fit"]["ckpt_path"].endswith("step=2.ckpt")
    assert again.trainer.global_step == 3
    assert os.listdir("runs/tiny") == ["version_0"]


class Signal(pl.Callback):
    """A signal in the fourth iteration, before it is computed."""

    number = signal.SIGTERM

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), self.number)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_saves_and_exits_and_last_goes_on(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Signal, "number", number)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as leaving:
        fit(9, "--trainer.callbacks+", "tests.runs.test_resume.Signal")
    assert leaving.value.code == 85
    assert signal.getsignal(number) == before
    saved = torch.load(FOLDER / "preempted.ckpt", weights_only=True)
    assert saved["global_step"] == saved["unidad_pl"]["iteration"] == 4
    resumed = fit(5, "--ckpt_path", "last")
    assert resumed.config_init["fit"]["ckpt_path"] == str(FOLDER / "preempted.ckpt")
    assert os.listdir("runs/tiny") == ["version_0"]
    starts = [json.loads(line) for line in Path("runs/tiny/version_0/environment.jsonl").read_text().splitlines()]
    assert [start["stage"] for start in starts] == ["fit", "fit"]
    for start in starts:
        assert {"host", "command", "git", "gpus", "python", "time"} <= set(start)
        assert start["seed"] == 0
        assert start["packages"]["torch"] == version("torch")


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_config_for_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    slurm = ("--config", str(ROOT / "configs" / "trainer" / "slurm.yaml"), "--trainer.accelerator", "cpu")
    cli = fit(1, *slurm, "--trainer.devices", "1")
    strategy = cli.trainer.strategy
    assert isinstance(strategy, ManualDDPStrategy)
    assert strategy._timeout == timedelta(minutes=10)
    assert cli.config_init["fit"]["ckpt_path"] is None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["csv", "wandb", "mlflow"])
def test_the_configs_for_loggers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """wandb and mlflow need not be installed for their configs to be read."""
    with pytest.raises(SystemExit) as leaving:
        fit(1, "--config", str(ROOT / "configs" / "trainer" / f"{name}.yaml"), "--print_config")
    assert leaving.value.code == 0
    loggers = yaml.safe_load(capsys.readouterr().out)["trainer"]["logger"]
    assert loggers[0]["init_args"]["name"] == name
    assert len(loggers) == (1 if name == "csv" else 2)


def test_a_signal_before_the_loops_exits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def early(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr("unidad_pl.cli.lightning.UnidadCLI", early)
    with pytest.raises(SystemExit) as leaving:
        run(["fit"])
    assert leaving.value.code == 85


def test_last_for_the_other_commands(four: Path) -> None:
    main(["predict", "--config", "config.yaml", "--ckpt_path", "last", "--data.evaluation.predict_samples", "1"])
    assert len(list(Path("runs").rglob("predictions/*.png"))) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_an_explicit_folder_of_checkpoints_is_searched_too(tmp_path: Path) -> None:
    place = ("--trainer.callbacks.dirpath", "elsewhere")
    fit(2, *place)
    found = fit(3, *place, "--ckpt_path", "last").config_init["fit"]["ckpt_path"]
    assert found == str(tmp_path / "elsewhere" / "step=2.ckpt")


def test_rows_that_a_killed_start_had_put_aside_come_back(tmp_path: Path) -> None:
    """Killed while Lightning's logger was made anew, which deletes the file it finds."""
    rows = "a,step\n1.0,0\n"
    for there in (False, True):  # a new file, or none yet
        logger = CSVLogger(tmp_path, "run", str(there))
        folder = Path(logger.log_dir)
        folder.mkdir(parents=True)
        (folder / "metrics.csv.kept").write_text(rows)
        if there:
            (folder / "metrics.csv").write_text("")
        _keep_rows(logger)
        assert (folder / "metrics.csv").read_text() == rows
        assert not (folder / "metrics.csv.kept").exists()

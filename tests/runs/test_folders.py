"""A run's own folder, and the newest of its checkpoints by what is stored in them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from tests.runs.test_resume import CONFIG, FOLDER, fit
from unidad_pl.callbacks.records import run_folder
from unidad_pl.files import BrokenFile
from unidad_pl.runs.checkpoints import (
    ENTRIES,
    DamagedCheckpoint,
    DurableCheckpointIO,
    newest_intact,
    read_checkpoint,
    write_checkpoint,
)
from unidad_pl.runs.resume import choose_folder, run_tree


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trainer(*loggers: Logger, **options: Any) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=list(loggers) or False, enable_progress_bar=False, **options)


def test_runs_that_begin_together_have_folders_of_their_own(here: Path) -> None:
    runs = [trainer(CSVLogger("runs", "x"), TensorBoardLogger("runs", "x")) for _ in range(8)]
    together = Barrier(len(runs))

    def begin(one: pl.Trainer) -> None:
        together.wait()
        choose_folder(one, None)

    threads = [Thread(target=begin, args=(one,)) for one in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.loggers[0].version for one in runs) == list(range(8))
    for one in runs:
        assert one.loggers[0].version == one.loggers[1].version
        assert run_folder(one).is_dir()


def test_a_number_is_free_for_every_logger(here: Path) -> None:
    Path("b/y/version_0").mkdir(parents=True)
    run = trainer(CSVLogger("a", "x"), CSVLogger("b", "y"))
    choose_folder(run, None)
    assert [logger.version for logger in run.loggers] == [1, 1]
    same = trainer(CSVLogger("a", "x"), CSVLogger(str(here / "a"), "x"))  # two names of one folder
    choose_folder(same, None)
    assert [logger.version for logger in same.loggers] == [2, 2]
    named = trainer(CSVLogger("a", "x", version="mine"))
    choose_folder(named, None)
    assert named.loggers[0].version == "mine"


class Project(Logger):
    """Names as W&B and MLflow give them: the project or the number of an experiment, and the id of a run."""

    def __init__(self, save_dir: str | None, version: str | int | None) -> None:
        super().__init__()
        self._dir, self._id = save_dir, version

    save_dir = property(lambda self: self._dir)  # type: ignore[assignment]
    name = property(lambda self: "project")  # type: ignore[assignment]
    version = property(lambda self: self._id)  # type: ignore[assignment]

    def log_metrics(self, *_: Any, **__: Any) -> None: ...

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        (Project("runs", "k3x9"), "runs/project/k3x9"),
        (Project("runs", 4), "runs/project/version_4"),
        (Project(None, "k3x9"), "ROOT/project/k3x9"),
        (CSVLogger("runs", "x", version=2), "runs/x/version_2"),
        (TensorBoardLogger("runs", "x", version="mine"), "runs/x/mine"),
        (None, "ROOT"),
    ],
)
def test_the_folder_of_every_logger(logger: Logger | None, folder: str, here: Path) -> None:
    run = trainer(*([] if logger is None else [logger]), default_root_dir="ROOT")
    assert os.path.relpath(run_folder(run)) == folder
    if isinstance(logger, Project):
        assert os.path.relpath(run_tree(run)[0]) == os.path.dirname(folder)


@pytest.mark.slow
def test_a_project_as_only_logger_keeps_config_numbers_and_checkpoints_together(here: Path) -> None:
    config = CONFIG["trainer"] | {"logger": [{"class_path": "tests.runs.test_folders.Project",
                                              "init_args": {"save_dir": "runs", "version": "k3x9"}}]}  # fmt: skip
    Path("own.yaml").write_text(str({"trainer": config}))
    fit(2, "--config", "own.yaml")
    run = Path("runs/project/k3x9")
    assert {"config.yaml", "environment.jsonl", "checkpoints"} <= set(os.listdir(run))
    assert fit(3, "--config", "own.yaml", "--ckpt_path", "last").config_init["fit"]["ckpt_path"].startswith(str(run))


class Delete(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            shutil.rmtree("runs/tiny/version_0")


@pytest.mark.slow
def test_a_folder_that_is_deleted_is_written_anew_and_said_in_the_end(here: Path) -> None:
    with (
        pytest.warns(UserWarning, match="was deleted or moved"),
        pytest.raises(RuntimeError, match="deleted at iteration 3"),
    ):
        fit(6, "--trainer.callbacks+", "tests.runs.test_folders.Delete")
    assert (FOLDER.parent / "config.yaml").is_file()
    assert (FOLDER.parent / "environment.jsonl").is_file()
    assert [path.name for path in FOLDER.iterdir() if path.name == "step=6.ckpt"]


def stored(path: Path, step: int, time: int, **more: Any) -> Path:
    write_checkpoint({"state_dict": {"w": torch.zeros(3)}, "global_step": step} | more, path)
    os.utime(path, (time, time))
    return path


def test_the_newest_goes_by_the_stored_step(tmp_path: Path) -> None:
    stored(tmp_path / "run" / "step=3.ckpt", 3, time=900)  # copied last
    stored(tmp_path / "run" / "step=12.ckpt", 12, time=100)
    stored(tmp_path / "run" / "a.ckpt", 12, time=200)
    assert newest_intact(tmp_path)[0] == tmp_path / "run" / "a.ckpt"
    stored(tmp_path / "later" / "step=1.ckpt", 1, time=50, run_started="2026-01-02T00:00:00+00:00")
    stored(tmp_path / "first" / "step=99.ckpt", 99, time=950, run_started="2026-01-01T00:00:00+00:00")
    assert newest_intact(tmp_path)[0] == tmp_path / "later" / "step=1.ckpt"
    os.truncate(tmp_path / "later" / "step=1.ckpt", 700)
    newest, passed_over = newest_intact(tmp_path)
    assert newest == tmp_path / "first" / "step=99.ckpt"
    assert [path.name for path in passed_over] == ["step=1.ckpt"]


def test_the_step_is_read_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path / "big.ckpt", 5, time=1)
    load = torch.load
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "load", lambda path, **options: (asked.append(options), load(path, **options))[1])
    newest_intact(tmp_path)
    assert asked == [{"map_location": "cpu", "mmap": True, "weights_only": True}]


WRONG: dict[str, Any] = {name: [1] if kind is not list else 7 for name, kind in ENTRIES.items()}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_of_another_type_are_refused(name: str, tmp_path: Path) -> None:
    write_checkpoint({"state_dict": {}} | {name: WRONG[name]}, tmp_path / "x.ckpt")
    with pytest.raises(BrokenFile, match=rf"x\.ckpt' is no checkpoint to resume from \(its entry {name} is"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("content", [[1, 2], {"weights": 1}, torch.zeros(2), {"state_dict": {"w": 1}}, None, "x"])
def test_other_contents_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(BrokenFile, match=r"x\.ckpt' is no checkpoint to resume from"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")
    assert newest_intact(tmp_path)[0] == tmp_path / "x.ckpt"


def test_whatever_is_wrong_with_a_file_is_one_sentence_that_names_it(tmp_path: Path) -> None:
    """300 damaged files, without the checksum that would notice all of it: as other programs write them."""
    path, generator = tmp_path / "x.ckpt", torch.Generator().manual_seed(0)
    torch.save({"state_dict": {"w": torch.arange(300.0)}, "global_step": 3, "name": "x" * 50}, path)
    whole, refused = path.read_bytes(), []
    for number in range(300):
        place, other = torch.randint(0, len(whole), (2,), generator=generator).tolist()
        damaged = whole[:place]
        if number % 3:
            damaged += bytes([whole[place] ^ (1 << number % 8)]) + whole[place + 1 :]
        if number % 3 == 2:
            damaged = damaged[:other] + damaged[other + 40 :]
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except (BrokenFile, DamagedCheckpoint) as error:
            refused.append(str(error))
            newest_intact(tmp_path)
    assert len(refused) > 200
    assert all(repr(str(path)) in sentence and len(sentence.splitlines()) == 1 for sentence in refused)

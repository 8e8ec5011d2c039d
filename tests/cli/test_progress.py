"""The bar names the phase and the time left of it; in a file it is a few lines; a user's own choice stays."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar, Timer

from tests.runs.test_resume import CONFIG, fit
from tests.worlds import unidad
from unidad_pl import Diffusion, NewUNet
from unidad_pl.cli import progress
from unidad_pl.cli.progress import Line, PhaseBar, pause, phases
from unidad_pl.cli.summary import NetworkTable

SHOWN = ("--trainer.enable_progress_bar", "true", "--trainer.enable_model_summary", "true")


class Clock:
    """A time that a test moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.mark.parametrize(
    ("pretrain", "until", "found"),
    [
        (0, None, [("distilling and adapting T", 9)]),
        (4, 4, [("adapting T", 4), ("distilling", 9)]),
        (4, 6, [("adapting T", 4), ("distilling and adapting T", 6), ("distilling", 9)]),
        (0, 6, [("distilling and adapting T", 6), ("distilling", 9)]),
        (9, 20, [("adapting T", 9)]),
        (20, 30, [("adapting T", 9)]),
    ],
)
def test_phases_are_those_of_the_iterations(pretrain: int, until: int | None, found: list[tuple[str, int]]) -> None:
    module = unidad(target_teacher__adaptation__pretrain=pretrain, target_teacher__adaptation__until=until)
    assert phases(module, 9) == found
    for name, end in found:  # what the module itself does in the last iteration of the phase
        module.iteration = end - 1
        assert ("T" in name) == (module.iteration < pretrain or module._target_updates(True) > 0)
        assert ("distilling" in name) == (module.iteration >= pretrain)


def test_other_modules_have_one_phase() -> None:
    assert phases(unidad(target_teacher=None), 9) == [("distilling", 9)]
    assert phases(Diffusion(NewUNet()), 9) == [("training", 9)]


def test_a_log_file_gets_few_lines_in_a_long_run(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A week at ten iterations a second."""
    asked = []
    line = Line("distilling", 6_048_000, 48_000)
    for hundred in range(480, 60_480):
        clock.now += 10
        line.show(hundred * 100, lambda: asked.append(1) or {"loss": 0.5})  # type: ignore[func-returns-value]
    line.close()
    lines = capsys.readouterr().out.splitlines()
    assert 500 < len(lines) == len(asked) + 1 < 1200  # values are asked for only where they are written
    assert "distilling: 48000/6048000" in lines[0]
    assert "loss=0.5" in lines[0]
    assert "\r" not in "".join(lines)


def test_the_time_left_follows_from_the_iterations_of_this_start(capsys: pytest.CaptureFixture[str]) -> None:
    line = Line("distilling", 300, 100)  # a run that goes on
    line.bar.start_t -= 40
    line.show(200)
    line.close()
    assert capsys.readouterr().out.startswith("distilling: 200/300, 00:40 gone, 00:40 left,  2.50it/s")


def test_pauses_grow_to_ten_minutes() -> None:
    assert [pause(elapsed) for elapsed in (0, 99, 3000, 1e6)] == [10, 10, 300, 600]


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_redrawn_and_evaluation_vanishes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(progress, "REDRAWN", 0.0)
    adapt = {"target_teacher": {"weight": 0.5, "adaptation": {"pretrain": 2, "until": 2, "update": "every"}}}
    options = [f"--model.init_args.{name}={value}" for name, value in adapt.items()]
    fit(5, *SHOWN, "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "4", *options)
    text = terminal.getvalue()
    for word in ("adapting T (1 of 2)", "2/2", "distilling (2 of 2)", "5/5", " left, ", "loss/fake=", "validating"):
        assert word in text
    assert "\r" in text
    assert "Epoch" not in text
    assert text.index("adapting T (1 of 2)") < text.index("distilling (2 of 2)")


def test_a_fit_in_a_file_says_its_phases(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(3, *SHOWN)
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.startswith("distilling and adapting T: 3/3, ")]) == 1
    for word in ("Epoch", "-2", "FLOPs", "in train mode", "Trainer already configured"):
        assert word not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "bar", "summary"),
    [
        (SHOWN, PhaseBar, NetworkTable),
        ((), None, None),
        (
            (*SHOWN, "--trainer.callbacks+", "lightning.pytorch.callbacks.RichProgressBar"),
            RichProgressBar,
            NetworkTable,
        ),
        ((*SHOWN, "--trainer.callbacks+", "lightning.pytorch.callbacks.ModelSummary"), PhaseBar, ModelSummary),
    ],
)
def test_a_users_choice_stays(options: tuple[str, ...], bar: type | None, summary: type | None, here: Path) -> None:
    found: list[Any] = fit(1, *options).trainer.callbacks  # type: ignore[attr-defined]
    for kind, wanted in ((ProgressBar, bar), (ModelSummary, summary)):
        assert [type(one) for one in found if isinstance(one, kind)] == ([] if wanted is None else [wanted])


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    bar, trainer = PhaseBar(), SimpleNamespace(is_global_zero=False, max_steps=3, global_step=0, sanity_checking=False,
                                               num_val_batches=[2], max_epochs=-1, num_training_batches=9)  # fmt: skip
    bar.setup(trainer, None, "fit")  # type: ignore[arg-type]
    bar.on_train_start(trainer, None)  # type: ignore[arg-type]
    bar.on_validation_start(trainer, None)  # type: ignore[arg-type]
    trainer.global_step = 3
    bar.on_train_batch_end(trainer, None, None, None, 2)  # type: ignore[arg-type]
    bar.on_validation_batch_end()
    bar.on_validation_end()
    bar.on_train_end()
    assert not capsys.readouterr().out


def test_a_run_that_time_ends_says_when(capsys: pytest.CaptureFixture[str]) -> None:
    timer = Timer(duration={"hours": 2})
    trainer: Any = SimpleNamespace(max_steps=-1, max_epochs=-1, num_training_batches=float("inf"), callbacks=[timer],
                                   progress_bar_metrics={"loss": 1.0})  # fmt: skip
    assert progress._iterations(trainer) == float("inf")
    assert progress._values(trainer) == {"loss": 1.0, "max_time in": "2:00:00"}
    line = Line("distilling", progress._iterations(trainer))
    line.show(7)
    line.close()
    assert capsys.readouterr().out.startswith("distilling: 7, 00:00 gone, ")


def test_a_run_in_epochs_knows_its_end() -> None:
    trainer: Any = SimpleNamespace(max_steps=-1, max_epochs=3, num_training_batches=5, accumulate_grad_batches=2)
    assert progress._iterations(trainer) == 9
    assert CONFIG["trainer"]["max_epochs"] == -1

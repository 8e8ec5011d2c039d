"""What loggers wrote, read again: of one start, of several, of a killed one, of a CSV file."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from tests.report.folders import write_events
from unidad_pl.report.curves import Curve, Logged, read_logged
from unidad_pl.report.folder import Run


def test_events_are_read(tmp_path: Path) -> None:
    write_events(tmp_path)
    logged = read_logged(tmp_path)
    assert set(logged.curves) == {"loss/fake", "balance/dmd_source"}
    assert logged.curves["loss/fake"] == Curve(list(range(20)), [float(i) for i in range(20)])
    assert logged.seconds == 19


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    write_events(tmp_path)
    (next(tmp_path.glob("events*"))).rename(tmp_path / "events.out.tfevents.1.vm.0")
    write_events(tmp_path, first=15, last=30, offset=100)
    curve = read_logged(tmp_path).curves["loss/fake"]
    assert curve.steps == list(range(30))
    assert curve.values[14:16] == [14, 115]


def test_what_a_killed_run_left(tmp_path: Path) -> None:
    write_events(tmp_path)
    path = next(tmp_path.glob("events*"))
    path.write_bytes(path.read_bytes()[:-200])
    curve = read_logged(tmp_path).curves["loss/fake"]
    assert 10 < len(curve.steps) < 20


def test_a_csv_file_does_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,loss/fake,step\n0,1.5,3\n0,,4\n0,0.5,5\n")
    assert read_logged(tmp_path).curves["loss/fake"] == Curve([3, 5], [1.5, 0.5])
    for wrong in ("x,3", "1,inf", f"1,{'1' * 400}"):
        (tmp_path / "metrics.csv").write_text(f"loss/fake,step\n{wrong}\n")
        assert "metrics.csv cannot be read" in read_logged(tmp_path).problems[0]


@pytest.mark.parametrize("most", [2, 10, 11, 500])
def test_thinning_loses_no_peak(most: int) -> None:
    values = [0.0] * 1000
    values[123], values[877] = 9.0, -9.0
    thin = Curve(list(range(1000)), values).thinned(most)
    assert len(thin.steps) <= most
    assert {9.0, -9.0} <= set(thin.values)
    assert thin.steps == sorted(thin.steps)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("most", [20, 100])
def test_thinning_beside_what_is_not_finite(odd: float, most: int) -> None:
    values = [0.0, odd, 0.5, odd] * 200 + [odd] * 200
    values[122], values[678] = 9.0, -9.0
    thin = Curve(list(range(1000)), values).thinned(most)
    finite = [value for value in thin.values if math.isfinite(value)]
    assert (max(finite), min(finite)) == (9.0, -9.0)
    assert len(thin.steps) <= most
    assert 0 < sum(step < 800 for step in thin.steps) == len(finite)
    assert not any(map(math.isfinite, thin.values[len(finite) :]))  # the run diverged: the line ends there
    assert thin.steps[-1] >= 800


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path: Path) -> None:
    write_events(tmp_path)
    os.mkfifo(tmp_path / "events.out.tfevents.9")
    logged = read_logged(tmp_path)
    assert logged.problems == ["events.out.tfevents.9 is no file"]
    assert logged.curves["loss/fake"]


def test_iterations_are_counted_as_the_logger_does() -> None:
    """It calls the first iteration 0, and an evaluation after the tenth one 10."""
    curves = {"loss/fake": Curve([0, 9], [1.0, 2.0])}
    assert Run(Path(), "run", logged=Logged(curves=curves)).iterations == 10
    curves |= {"val/fid": Curve([10], [1.0]), "epoch": Curve([10], [0.0])}
    assert Run(Path(), "run", logged=Logged(curves=curves)).iterations == 10

"""The fault table: what is lost, and who says what. Two gloo ranks; one process for kill -9.

* kill -9 in training, at a validation, in each stage of writing a checkpoint, and at three random moments: resumed from
  the newest intact file, or from the start where there is none, the run ends bit-equal, and trains again in seconds.
* One rank gets SIGUSR1: both stop after the same iteration, save, exit; resumed the run ends bit-equal.
* NaN in one rank's loss: both skip that optimiser's step; after N in a row both end with an error.
* One rank is killed, or hangs for longer than the timeout: the other ends with an error that names it.
* A missing file, a failing metric, a full disk on one rank: both end with that rank's message.
* A damaged newest checkpoint, SIGTERM to the command: tests/test_going_on.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fault_script
from tests.fault_script import MOMENTS, RANDOM
from tests.processes import run_apart

pytestmark = [pytest.mark.slow, pytest.mark.ci]

RECOVERED = 10.0  # seconds from the search for a checkpoint to the next iteration; on two busy cores 0.3 to 1.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    run_apart(place, fault_script.main, place, [], timeout=1800)
    return place


def of_both(folder: Path, case: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{case}{rank}.json").read_text()) for rank in range(2)]


def compared(folder: Path, files: tuple[str, ...], rtol: float) -> dict[str, torch.Tensor]:
    """The weights of one process, which those of two ranks are close to, while both are the same."""
    alone, first, second = (torch.load(folder / f"{name}.pt", weights_only=True) for name in files)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, atol=1e-6, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")
    return alone


def test_two_ranks_train_as_one_with_the_batch_of_both(folder: Path) -> None:
    """Four iterations, accumulation 2 and 4, in float64: in float32 Adam makes a step of the rate of any rounding."""
    alone = compared(folder, ("alone", "rank0", "rank1"), rtol=0)
    moved = (value - alone[name.replace("student", "source_teacher", 1)] for name, value in alone.items())
    assert max(float(difference.abs().max()) for difference in moved) > 1e-3


def test_adapters_train_on_two_ranks_as_on_one(folder: Path) -> None:
    """Bit-equal on both ranks, the base untouched; a prompt's and a photo's way through a tiny Stable Diffusion."""
    alone = compared(folder, ("adapters_alone", "adapters0", "adapters1"), rtol=1e-4)
    moved = 0.0
    for name, value in alone.items():
        if ".lora_B." in name and name.startswith("student"):  # zero at first
            moved = max(moved, float(value.abs().max()))
        if ".base_layer." in name:
            assert torch.equal(value, alone["source_teacher.unet." + name.partition(".unet.")[2]])
    assert moved > 1e-4


def test_the_gradient_bytes_of_the_group_that_steps_and_nothing_else(folder: Path) -> None:
    for result in of_both(folder, "equal"):
        student, fake, target = (result[name] for name in ("student", "fake", "target"))
        # The student steps in every second iteration. At the end one number: whether the weights have diverged.
        assert result["sent"] == [student, fake, target, fake] * 2 + [4]


def test_nan_on_one_rank_skips_that_step_on_both(folder: Path) -> None:
    first, second = of_both(folder, "nan")
    assert first["sha"] == second["sha"]
    for result in (first, second):
        assert (result["steps"], result["global_step"], result["finite"]) == ([2, 3, 3], 3, True)


def test_nan_for_good_ends_both(folder: Path) -> None:
    for result in of_both(folder, "nan_for_good"):
        assert "1 iterations in a row had a non-finite loss or gradient for 'student'" in result["error"]


@pytest.mark.parametrize("case", ["killed", "hung"])
def test_a_rank_that_does_not_answer_is_named(folder: Path, case: str) -> None:
    result = json.loads((folder / f"{case}0.json").read_text())
    assert "rank 1 does not answer" in result["error"]
    assert result["seconds"] < 60


def test_a_frozen_rank_0_is_named_although_its_store_is_silent(folder: Path) -> None:
    result = json.loads((folder / "frozen1.json").read_text())
    assert "rank 0 does not answer (dead or hung)" in result["error"]
    assert result["seconds"] < 60


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other_batch", "data.batch is 2 on rank 0 and 3 on rank 1"),
        ("other_shots", "data.shots is '"),
        ("other_rate", "model.fake_score.optimizer.lr is 0.001 on rank 0 and 0.002 on rank 1"),
    ],
)
def test_ranks_that_would_train_otherwise_are_told_apart(folder: Path, case: str, message: str) -> None:
    for result in of_both(folder, case):
        assert f"the ranks do not agree: {message}" in result["error"]


@pytest.mark.parametrize(
    ("case", "culprit", "message"),
    [
        ("missing_file", 1, "FileNotFoundError: no such picture: shots/3.png"),
        ("broken_metric", 0, "ZeroDivisionError: FID: the reference set is empty"),
    ],
)
def test_both_end_with_the_message_of_the_rank_that_failed(folder: Path, case: str, culprit: int, message: str) -> None:
    errors = [result["error"] for result in of_both(folder, case)]
    assert errors[culprit] == message
    assert f"rank {culprit} failed with {message}" in errors[1 - culprit]


def test_a_full_disk_ends_both_and_leaves_the_checkpoint_before(folder: Path) -> None:
    first, second = of_both(folder, "full_disk")
    assert "cannot write the checkpoint (File too large)" in first["error"]
    assert second["error"] == first["error"]
    assert os.listdir(folder / "disk") == ["x.ckpt"]
    assert torch.load(folder / "disk" / "x.ckpt", weights_only=True)["global_step"] == 1


def test_one_preempted_rank_stops_both_after_the_same_iteration(folder: Path) -> None:
    assert of_both(folder, "preempted")[0]["exit"] == 77
    saved = torch.load(folder / "checkpoints" / "preempted.ckpt", weights_only=True)
    assert saved["global_step"] in (2, 3)  # the iteration of the signal, or the next, which all agree on
    for result in of_both(folder, "resumed"):
        assert result["resumed"] == result["whole"]


@pytest.mark.parametrize("moment", [*MOMENTS, *RANDOM])
def test_kill_9_loses_nothing(folder: Path, moment: str) -> None:
    results = json.loads((folder / "kill_9.json").read_text())
    result = results[moment]
    assert (result["damaged"], result["sha"]) == (0, results["whole"])
    assert result["seconds"] < RECOVERED
    if moment in MOMENTS:
        assert result["died"] == -9
        assert result["from"] == ("step=2.ckpt" if moment in ("after the rename", "validation") else "step=1.ckpt")
    else:
        assert result["died"] in (-9, 0)  # a victim in a hurry may have ended

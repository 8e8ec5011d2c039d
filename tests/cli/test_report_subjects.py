"""`unidad report subjects` and the array job over subjects."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from unidad_pl.cli.main import main
from unidad_pl.cli.report_subjects import report_subjects
from unidad_pl.data.prompts import read_dreambooth
from unidad_pl.files import BrokenFile

SCRIPT = Path(__file__).resolve().parents[2] / "configs" / "sdp_dreambooth.sbatch"
LIST = "\ufeffsubject_name,class\ncan,can\ncat2, cat\n\nduck_toy,toy\n\nPrompts, and more\n\n" + 2 * (
    "prompt_list = [\n'a red {0} {1}'.format(unique_token, class_token)\n]\n"
)


def write(folder: Path, subject: str | None, clip_i: float | None, **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "metric": "SubjectSimilarity", "stage": "test", "subject": subject, "step": 5, "samples": 100,
        "resolution": [512, 512], "extractor": {"clip_i": "clip"}, "values": {"clip_i": clip_i},
        "time": "2026-01-01T00:00:00+00:00",
    } | more  # fmt: skip
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def test_the_table_has_the_latest_value_of_each_subject_and_their_mean(tmp_path: Path) -> None:
    write(tmp_path / "a", "dog", 0.1)
    write(tmp_path / "a", "dog", 0.5)  # a later line of the same run
    write(tmp_path / "a", "dog", 0.9, stage="val")
    write(tmp_path / "b" / "run", "can", 0.2, time="2026-01-03T00:00:00+00:00")
    write(tmp_path / "c", "can", 0.8)  # an earlier run
    write(tmp_path / "d", "vase", None)
    write(tmp_path / "a", None, None, metric="PromptDiversity", values={"intra_prompt_lpips": 0.3})
    write(tmp_path / "e", None, 0.7, metric="FID")
    table = report_subjects(str(tmp_path), out=str(tmp_path / "made" / "table.csv"))
    assert [line.split() for line in table.splitlines() if "---" not in line] == [
        ["subject", "clip_i", "intra_prompt_lpips"],
        ["can", "0.2000"],
        ["dog", "0.5000", "0.3000"],
        ["vase"],
        ["mean", "0.3500", "0.3000"],
    ]
    rows = (tmp_path / "made" / "table.csv").read_text().splitlines()
    assert rows[1:3] == ["can,0.2000,", "dog,0.5000,0.3000"]
    assert "0.9000" in report_subjects(str(tmp_path), stage="val")


def test_a_subject_may_be_called_mean(tmp_path: Path) -> None:
    write(tmp_path / "a", "mean", 0.9)
    write(tmp_path / "b", "dog", 0.5)
    rows = [line.split() for line in report_subjects(str(tmp_path)).splitlines()]
    assert rows[1:3] == [["dog", "0.5000"], ["mean", "0.9000"]]
    assert rows[-1] == ["mean", "0.7000"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": [1]},
        {"values": {"clip_i": "0.5"}},
        {"step": None},
        {"time": 3},
        {"values": None},
        {"values": {"clip_i": 10**400}},
        {"values": {"clip_i": True}},
        {"stage": 3},
    ],
    ids=lambda wrong: str(wrong)[:40],
)
def test_a_record_of_other_types_is_named(wrong: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "a", "dog", 0.5)
    write(tmp_path / "b", "can", 0.5, **wrong)
    reason = "a number of 401 digits" if "1" + "0" * 400 in str(wrong) else f"its entry '{next(iter(wrong))}' is"
    with pytest.raises(BrokenFile, match=rf"b/metrics\.jsonl': line 1 cannot be used \({reason}"):
        report_subjects(str(tmp_path))


@pytest.mark.parametrize(
    "line", [b"[" * 9000, b"3", b"null", b"[]", b"\xff\xfe\x00", b"{'a': 1}", b"1" * 5000, b'{"stage": "te', b"{}"],
    ids=lambda line: str(line[:9]),
)  # fmt: skip
def test_lines_that_are_no_records_are_named(line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a", "dog", 0.5)
    place = tmp_path / "a" / "metrics.jsonl"
    whole = place.read_bytes()
    place.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(BrokenFile, match=r"a/metrics\.jsonl': line 2 cannot be used"):
        report_subjects(str(tmp_path))
    place.write_bytes(whole + b'{"stage": "te')  # what a killed run leaves
    assert "0.5000" in report_subjects(str(tmp_path))
    assert "metrics.jsonl': line 2 was cut short when the run was killed" in caplog.text


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", "dog", 0.5)
    main(["report", "subjects", "--runs", str(tmp_path)])
    assert "dog      0.5000" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no folder"):
        main(["report", "subjects", "--runs", str(tmp_path / "none")])


def test_what_cannot_be_a_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a test record of the callback SubjectSimilarity: run unidad test first"):
        report_subjects(str(tmp_path))
    write(tmp_path / "a", "dog", 0.5)
    for name, value in (("extractor", {"clip_i": "other"}), ("samples", 4), ("resolution", [64, 64])):
        write(tmp_path / "b", "can", 0.5, **{name: value})
        with pytest.raises(ValueError, match=f"was measured with {name} .* one table must not mix them"):
            report_subjects(str(tmp_path))
    write(tmp_path / "c", None, 0.5)
    with pytest.raises(ValueError, match="names no subject: pass subject="):
        report_subjects(str(tmp_path))


def test_the_array_job_runs_each_subject_of_the_list_by_its_folders_name(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "unidad"
    stub.write_text('#!/bin/bash\necho "$@" >> "$CALLS"\n')
    stub.chmod(0o755)
    (tmp_path / "prompts_and_classes.txt").write_text(LIST.replace("\n", "\r\n"))
    subjects = list(read_dreambooth(tmp_path / "prompts_and_classes.txt").classes)
    assert subjects == ["can", "cat2", "duck_toy"]

    def job(number: int) -> list[str]:
        calls = tmp_path / f"calls{number}"
        calls.unlink(missing_ok=True)
        place = {"DATA": str(tmp_path), "RUNS": str(tmp_path / "runs"), "CALLS": str(calls)}
        environment = os.environ | place | {"SLURM_ARRAY_TASK_ID": str(number)}
        environment["PATH"] = f"{stub.parent}:{environment['PATH']}"
        subprocess.run(["bash", str(SCRIPT)], env=environment, check=True, capture_output=True, timeout=20)
        return calls.read_text().splitlines()

    for number, subject in enumerate(subjects):
        (tmp_path / subject).mkdir()
        fit, test = job(number)
        assert f"--data.root {tmp_path / subject} " in fit
        assert fit.endswith("--ckpt_path auto")  # continues where it was cut off
        last = tmp_path / "runs" / subject / "run" / "checkpoints" / "last.ckpt"
        assert test == f"test --config {last.parents[1] / 'config.yaml'} --ckpt_path {last}"
    with pytest.raises(subprocess.CalledProcessError):
        job(3)

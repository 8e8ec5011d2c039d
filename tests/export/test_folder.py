"""An export replaces its own files and no others; killed or failing at any point it loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.export.made import export, pixel_student
from unidad_pl.export import load_export
from unidad_pl.export.card import config_of_card
from unidad_pl.files import moved_aside, recover, replacing

ROOT = Path(__file__).resolve().parents[2]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["thesis.tex", ".git/HEAD", "unet/notes.txt", "scheduler/old/config.json", "unet/adm.json", "000000.png"]
)
def test_a_folder_with_foreign_files_is_refused_and_left_as_it_is(name: str, tmp_path: Path) -> None:
    student, out = pixel_student(), tmp_path / "out"
    export(student, out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("years of work")
    before = tree(out)
    with pytest.raises(FileExistsError, match=name.partition("/")[0]):
        export(student, out)
    assert tree(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1" * 400, "a number of 400 digits"), ("[" * 100_000, "recursion"), ("[]", "no JSON object but a list"),
        ("\0" * 40, "no JSON: Expecting value"), ("{}", "no entry 'step'"),
        ('{"step": 3, "stage": "val"}', "no entry 'values'"),
        ('{"step": 3, "stage": "val", "values": ["fid"]}', "its entry 'values' is ['fid']"),
        (f'{{"step": 3, "stage": "val", "values": {{"fid": {"1" * 400}}}}}', "a number of 400 digits"),
        ('{"step": 3, "stage": "val", "values": {"fid": "low"}}', "its entry 'values' is"),
        ('{"step": 3, "stage": "val", "values": {}, "metric": []}', "its entry 'metric' is []"),
        ('{"step": 3, "stage": "val", "values": {"kid": NaN, "fid": 1e999}}', None),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_odd_lines_of_metrics_are_named_in_the_card(
    line: str, reason: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = '{"metric": "FID", "step": 7, "stage": "val", "values": {"fid": 12.5}, "samples": 9}\n'
    (tmp_path / "metrics.jsonl").write_text(f'{whole}{line}\n{whole}{{"metric": "FI')
    card = (export(replace(pixel_student(), folder=tmp_path), tmp_path / "out") / "README.md").read_text()
    assert "| fid | 12.5 | val | 7 | 9 |" in card
    assert "| kid |" not in card  # JSON knows no NaN: nothing was measured
    assert "\n- metrics.jsonl: line 4 was cut short when the run was killed, and is left out\n" in card
    assert ("- metrics.jsonl: line 2 cannot be used (" in card) == (reason is not None)
    assert (reason or "") in card
    assert "not in the model card: metrics.jsonl: line 4 was cut short" in caplog.text


@pytest.mark.slow  # a process of its own, which imports everything
def test_the_card_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    code = """
import locale, sys
from dataclasses import replace
from pathlib import Path
from tests.export.made import export, pixel_student
from unidad_pl.export.folder import read_record
assert locale.getpreferredencoding(False) not in ("UTF-8", "utf-8")
config = {"data": {"init_args": {"root": "photos/\\u30c1\\u30e3\\u30a6", "class_word": "caf\\u00e9"}}}
(Path(sys.argv[1]) / "metrics.jsonl").write_bytes(
    '{"step": 1, "stage": "val", "values": {"share/caf\\u00e9": 0.5}}'.encode())
out = export(replace(pixel_student(), config=config, folder=Path(sys.argv[1])), Path(sys.argv[1]) / "out")
assert read_record(out)["files"]
"""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=os.environ | plain,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_bytes().decode("utf-8")
    assert "# \u30c1\u30e3\u30a6\n" in card
    assert "| share/caf\u00e9 | 0.5 |" in card
    assert config_of_card(tmp_path / "out")["data"]["init_args"]["class_word"] == "caf\u00e9"


@pytest.mark.parametrize("name", ["empty", "to_a_file", "to_a_folder"])
def test_links_and_empty_folders_of_others_are_foreign_too(name: str, tmp_path: Path) -> None:
    student, out = pixel_student(), tmp_path / "out"
    export(student, out)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.tex").write_text("x")
    if name == "empty":
        (out / name).mkdir()
    else:
        (out / name).symlink_to(tmp_path / "elsewhere" / ("thesis.tex" if name == "to_a_file" else ""))
    with pytest.raises(FileExistsError, match=name):
        export(student, out)
    assert (tmp_path / "elsewhere" / "thesis.tex").read_text() == "x"


def test_what_comes_while_the_export_is_written_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, out = pixel_student(), tmp_path / "out"
    export(student, out)
    write_text = Path.write_text

    def written_meanwhile(path: Path, *args: Any, **options: Any) -> int:
        write_text(out / "thesis.tex", "x")
        return write_text(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", written_meanwhile)
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        export(student, out)
    assert (out / "thesis.tex").exists()
    assert load_export(out).iteration == 7


def test_a_place_that_is_no_folder_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = pixel_student()
    for name, content in (("record", '{"files": 3}'), ("list", "[]"), ("deep", "[" * 10_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "unidad.json").write_text(content)
        (tmp_path / name / "thesis.tex").write_text("x")
        with pytest.raises(FileExistsError, match=r"thesis\.tex"):
            export(student, tmp_path / name)
    with pytest.raises(FileExistsError, match="is a file"):
        export(student, tmp_path / "list" / "thesis.tex")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="the folder you are in"):
        export(student, Path("."))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    for _ in range(2):  # the second one replaces what the link leads to
        export(student, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_export(tmp_path / "real").iteration == 7


def test_a_home_folder_is_where_the_shell_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    export(pixel_student(), Path("~/out"))
    assert load_export("~/out").folder == tmp_path / "out"


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_whichever_rename_fails_the_old_export_is_there(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, out = pixel_student(), tmp_path / "out"
    export(student, out)
    student.iteration, rename, calls = 8, os.rename, []

    def fails(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) > failing:  # from that one on
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    if failing < 2:
        with pytest.raises(OSError, match=r"No space left|rename that back") as info:
            export(student, out)
        monkeypatch.undo()
        if failing == 1:  # it could not be put back either: the error and the next command say where it is
            assert str(moved_aside(out)) in str(info.value)
            with pytest.raises(FileNotFoundError, match=r"\.out\.\w+\.old.*rename it back"):
                load_export(out)
            recover(out)
        assert load_export(out).iteration == 7
    else:
        export(student, out)
        assert load_export(out).iteration == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from unidad_pl.files import replacing
calls = 0
def deadly(function):
    def called(*args, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return called
for place, name in ((os, "mkdir"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")):
    setattr(place, name, deadly(getattr(place, name)))
with replacing(Path(sys.argv[1])) as part:
    part.mkdir()
    for name in "abc":
        (part / name).write_text("new")
"""


def test_killed_at_any_call_old_or_new_is_there_or_found_by_the_next(tmp_path: Path) -> None:
    ends = []
    for call in range(1, 12):
        out = tmp_path / str(call) / "out"
        with replacing(out) as part:
            part.mkdir()
            (part / "a").write_text("old")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(call)], env=environment, check=False)
        assert done.returncode in (0, -signal.SIGKILL)
        if not out.exists():
            assert tree(moved_aside(out)) == {"a": b"old"}  # type: ignore[arg-type]
            ends.append("aside")
        else:
            ends.append("new" if tree(out) == dict.fromkeys("abc", b"new") else "old")
            assert ends[-1] == "new" or tree(out) == {"a": b"old"}
        recover(out)
        assert tree(out) in ({"a": b"old"}, dict.fromkeys("abc", b"new"))
        if done.returncode == 0:
            break
    assert done.returncode == 0
    assert {"old", "aside", "new"} == set(ends)
    for left in (tmp_path / "1").rglob(".out.*.part"):
        os.utime(left, (0, 0))
    recover(tmp_path / "1" / "out")
    assert not list((tmp_path / "1").rglob(".out.*"))  # after an hour

"""The page of a run: everything in it, nothing from elsewhere, and a sentence for what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.report.folders import clusters, evaluation, make_run, noise
from unidad_pl.cli.main import main
from unidad_pl.report import page, report
from unidad_pl.report.folder import read_run_folder
from unidad_pl.report.page import write_page
from unidad_pl.report.pictures import read_pictures


def written(*folders: Path) -> str:
    """The page about ``folders``, without plotly's code."""
    target = write_page(folders, folders[0].parent / "page.html")
    assert target.stat().st_size < page.MOST_BYTES
    html = target.read_text(encoding="utf-8")
    start = html.index("<script>")
    return html[:start] + html[html.index("</head>") :]


def test_a_page_about_a_run(tmp_path: Path) -> None:
    html = written(make_run(tmp_path / "my run"))
    assert not re.findall(r'\b(?:src|href)="(?!data:|#)[^"]*"', html)  # nothing from anywhere else
    assert "not on this page" not in html  # nothing is missing
    assert 'max="1" value="1" aria-label="networks: evaluation"' in html
    assert html.count('class="frame networks"') == 4
    assert re.findall(r"<figcaption>(.*?)</figcaption>", html)[:3] == ["student", "target teacher", "source teacher"]
    assert len(re.findall(r'<div class="tile copy">', html)) == 1  # the one below the threshold
    assert html.count('alt="shot 1"') == 2
    assert "3 samples, 0.7 apart" in html
    assert "The reference is 40 other images of the domain from builtin:cats without the shots" in html
    assert "iteration 10, fid 5; its weights are in checkpoints/epoch=0-step=10.ckpt" in html
    assert html.count('class="healthy"') == html.count('class="plotly-graph-div"') == 4
    assert "The losses of G and D" not in html  # no such loss was logged
    assert '"star"' in html
    assert "Abacus 3" in html
    assert "9.8.7" in html
    assert "model.student.num_steps" not in html  # the page names the options as configs do
    assert "model.init_args.student" not in html
    assert re.search(r"sample --model '\S*.*my run/checkpoints/last.ckpt' --num 64", html.replace("&#39;", "'"))
    assert "--trainer.max_steps 40" in html


def test_the_options_that_differ_are_listed(tmp_path: Path) -> None:
    html = written(make_run(tmp_path / "run"))
    rows = dict(re.findall(r"<tr><th>([\w.]+)</th><td>(.*?)</td><td", html))
    assert rows["model.student.sigma_min"] == "0.3"
    assert rows["seed_everything"] == "3"
    assert "model.student.num_steps" not in rows  # 3 is the default


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a" / "version_0"), make_run(tmp_path / "b" / "version_0", seed_everything=4)
    html = written(first, second)
    assert "<th>a/version_0</th><th>b/version_0</th>" in html
    assert re.search(r"<th>seed_everything</th><td>3</td><td>4</td>", html)
    assert html.count('aria-label="networks: evaluation"') == 2
    assert {"fake, a/version_0", "fake, b/version_0"} <= set(
        re.findall(r'"name":"(.*?)"', html.replace("\\u002f", "/"))
    )
    again = make_run(tmp_path / "c" / "a" / "version_0")
    assert str(again) in written(first, again)  # two of one name are told apart


def test_what_files_hold_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    run = make_run(tmp_path / "<img src=x>", seed_everything=bad)
    (run / "metrics.jsonl").write_text(json.dumps(evaluation(10, 5.0) | {"values": {bad: 1.0}, "extractor": bad}))
    (run / "environment.jsonl").write_text(json.dumps({"host": bad, "packages": {bad: bad}}))
    noise(run / 'samples/networks/val_step00000010/"onload="x.png')
    html = written(run)
    assert bad not in html
    assert "<img src=x>" not in html
    assert 'alt=""onload' not in html
    assert "&lt;script&gt;alert(1)" in html


def cut(path: Path, end: int = 0) -> None:
    """Without its ``end`` last bytes, or its second half."""
    path.write_bytes(path.read_bytes()[: -end or path.stat().st_size // 2])


def spoil(path: Path) -> None:
    """Odd lines among those that are there."""
    lines = path.read_text().splitlines()
    odd = evaluation(15, 1.0)
    lines[2:2] = ["[1]", json.dumps(odd | {"values": {"fid": "low"}}), json.dumps(odd | {"step": "x"}), '{"step": 1}']
    path.write_text("\n".join(lines) + "\n")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda run: (run / "config.yaml").unlink(), "there is no config.yaml, so how"),
    "no mapping": (lambda run: (run / "config.yaml").write_text("- 1"), "config.yaml cannot be read"),
    "tags": (lambda run: (run / "config.yaml").write_text("a: !!python/name:os.system"), "config.yaml cannot be read"),
    "odd config": (lambda run: (run / "config.yaml").write_text("model: 3\ntrainer: [x]\ndata: {init_args: 1}"), ""),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "there is no metrics.jsonl, so no evaluation"),
    "half a line": (lambda run: cut(run / "metrics.jsonl", 9), "metrics.jsonl: line 4 was cut short when the run was"),
    "odd lines": (lambda run: spoil(run / "metrics.jsonl"), "metrics.jsonl: line 3 cannot be used (it is no JSON obj"),
    "half a start": (lambda run: cut(run / "environment.jsonl"), "environment.jsonl: line 1 was cut short"),
    "no record": (lambda run: (run / "metrics.jsonl").write_text('[1]\n{"values": 3}\n{"step": "x"}'), "neither shots"),
    "no environment": (lambda run: (run / "environment.jsonl").unlink(), "versions and hardware are not known"),
    "endless environment": (lambda run: (run / "environment.jsonl").write_text(f'{{"cores": {"1" * 5000}}}\n'),
                            "environment.jsonl: line 1 cannot be used (a number of 5000 digits"),
    "odd environment": (lambda run: (run / "environment.jsonl").write_text('{"packages": 3, "gpus": {}}'), ""),
    "cost": (lambda run: (run / "cost.json").write_text("["), "cost.json cannot be read"),
    "endless cost": (lambda run: (run / "cost.json").write_text(f'{{"tflops": {"1" * 400}}}'), "of 400 digits"),
    "odd cost": (lambda run: (run / "cost.json").write_text('{"tflops": "x", "evaluations": [1]}'), ""),
    "events cut": (lambda run: cut(next(run.glob("events*"))), ""),
    "events": (lambda run: next(run.glob("events*")).write_bytes(b"no events"), "no TensorBoard events"),
    "picture cut": (lambda run: cut(run / "samples/val_step00000010.png"), "a picture cannot be shown"),
    "no pictures": (lambda run: (run / "samples").rename(run / "other"), "no samples of the teachers"),
    "clusters": (lambda run: cut(run / "samples/clusters/val_step00000020.png"), "clusters cannot be shown"),
    "no checkpoints": (lambda run: (run / "checkpoints").rename(run / "other"), "There is no checkpoint"),
    "no picture": (lambda run: (run / "samples/networks/val_step00000030").mkdir(), "30 has 0 pictures"),
    "endless table": (lambda run: (next(run.glob("events*")).unlink(), (run / "metrics.csv").write_text(
        f"loss/fake,step\n1,{'1' * 400}\n")), "metrics.csv cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_has_a_page(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    damage, said = DAMAGE[kind]
    damage(run)
    html = written(run)
    assert said in html
    assert "Samples over training" in html


@pytest.mark.parametrize("change", [{"picture": "../secret.png"}, {"resolution": [3, 3]}, {"cluster_sizes": []},
                                    {"clusters": [{}, {}]}, {"resolution": None}, {"threshold": {}}])  # fmt: skip
def test_a_record_that_does_not_fit_its_picture(change: dict[str, object], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    noise(tmp_path / "secret.png", 16, 56)
    (run / "metrics.jsonl").write_text(json.dumps(clusters(20) | change))
    found = read_pictures(read_run_folder(run), 10**6)
    assert found.clusters == []
    assert any("clusters cannot be shown" in one for one in found.missing)


def test_another_module_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model={"class_path": "unidad_pl.Diffusion", "init_args": {"source": None}})
    html = written(run)
    assert "unidad export" not in html.replace("/work", "")
    assert " export --ckpt_path" not in html
    assert " predict --config" in html


def test_many_large_pictures_are_thinned(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for step in range(30, 40):
        noise(run / f"samples/val_step{step:08d}.png", 300, 300, seed=step)
    whole, some = (read_pictures(read_run_folder(run), budget) for budget in (10**7, 600_000))
    assert [frame.step for frame in whole.samples] == [10, 20, *range(30, 40)]
    assert 1 < len(some.samples) < len(whole.samples)
    assert (some.samples[0].step, some.samples[-1].step) == (10, 39)
    assert (
        f"only {len(some.samples)} of the 12 evaluations in samples/ are shown, to keep the page small" in some.missing
    )
    cut(run / "samples/val_step00000035.png")
    missing = read_pictures(read_run_folder(run), 10**7).missing
    assert any("a picture cannot be shown" in one for one in missing)
    assert not any("to keep the page small" in one for one in missing)  # it is there, and damaged
    assert sum(len(one) for frame in some.samples for one in frame.pictures.values()) <= 600_000


def test_the_monitor_names_the_best(tmp_path: Path) -> None:
    run = read_run_folder(make_run(tmp_path / "run", checkpoint={"monitor": "val/fid", "mode": "max"}))
    assert run.best() == ("fid", 20, 7.0)
    run = read_run_folder(make_run(tmp_path / "other", checkpoint={"monitor": "val/nothing"}))
    assert run.best() is None
    assert "none has a value of nothing" in page.best_text(run)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("odd", ["NaN", "Infinity", "-Infinity", "1e999", "null"])
def test_what_is_not_finite_is_never_the_best(odd: str, mode: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", checkpoint={"monitor": "val/fid", "mode": mode})
    lines = [
        json.dumps(evaluation(step, fid)) for step, fid in ((5, 0.25), (10, 5.0), (15, 0.25), (20, 7.0), (25, 0.25))
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines).replace("0.25", odd) + "\n")
    run = read_run_folder(folder)
    assert run.best() == (("fid", 10, 5.0) if mode == "min" else ("fid", 20, 7.0))
    assert "At iteration 5, 15, 25 fid has no finite value." in page.best_text(run)
    (folder / "metrics.jsonl").write_text(lines[0].replace("0.25", odd) + "\n")
    assert read_run_folder(folder).best() is None


def test_more_shots_than_the_page_shows_are_told(tmp_path: Path) -> None:
    run, shots = make_run(tmp_path / "run"), 26
    many = clusters(20) | {
        "clusters": clusters(20)["clusters"] * 13,
        "cluster_sizes": [3] * 26,
        "cluster_means": [1] * 26,
    }
    (run / "metrics.jsonl").write_text(json.dumps(many) + "\n")
    noise(run / "samples/clusters/val_step00000020.png", shots * 8, 7 * 8)
    html = written(run)
    assert "only the first 24 of 26 shots and their clusters are shown" in html
    assert "The run was trained on 26, the first of them are these 24." in html


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    main(["report", str(first)])
    assert capsys.readouterr().out == f"written: {first / 'report.html'}\n"
    main(["report", "first", str(second)])
    assert (tmp_path / "report.html").is_file()
    main(["report", "--out", "made/here.html", "first"])
    assert (tmp_path / "made" / "here.html").is_file()
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "deep" / "a" / "version_0")
    for words, code, said in (
        (["empty"], 1, "is no run folder"), (["runs/none"], 1, "no folder 'runs/none': a run folder is what"),
        (["nowhere"], 1, "'unidad fit --config configs/quickstart.yaml' makes one"), (["memori"], 2, "use one of"),
        ([str(first / "config.yaml")], 1, "is a file and no run folder: a run folder is what 'unidad fit' writes"),
        ([str(tmp_path)], 1, "first' in it is one"), (["deep"], 1, "'deep/a/version_0' in it is one"), ([], 2, "runs"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(["report", *words])
        err = capsys.readouterr().err
        assert ended.value.code == code, words
        assert said in err
        assert err.count("\n") == 1


def test_its_help_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in ("runs run folders. One is what unidad fit makes",
                 "What is missing or damaged in a run folder is listed",
                 "other commands: unidad report memory, unidad report subjects"):  # fmt: skip
        assert part in said


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape("pip install 'unidad_pl[report]'")):
        report(str(make_run(tmp_path / "run")))

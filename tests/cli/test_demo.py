"""`unidad demo` draws what `unidad sample` draws, beside the source where it is found, and walks on the sphere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.export.made import export, pixel_student, text_student
from unidad_pl.cli import demo as command
from unidad_pl.cli.demo_studio import SOURCE_STEPS, Studio, slerp, walking_noise
from unidad_pl.cli.sample import sample
from unidad_pl.data.pictures import as_uint8
from unidad_pl.sampling import FewStepSampler, heun, sampling_sigmas, seeded_noise

SMALL: dict[str, Any] = dict(resolution=8, channels=[8, 16], attention_levels=[], head_channels=8, norm_groups=4)


def exported_with(source: dict[str, Any] | None, out: Path, **options: Any) -> Path:
    """An export whose card says that ``source`` was the run's source."""
    student = pixel_student(**options)
    student.config = {} if source is None else {"model": {"class_path": "x", "init_args": {"source": source}}}
    return export(student, out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of 8 x 8 pixels, made from another network, a folder that is still there."""
    place = tmp_path_factory.mktemp("demo")
    torch.manual_seed(1)
    from unidad_pl import NewUNet

    NewUNet(**SMALL).build().save_pretrained(place / "source")  # type: ignore[operator]
    source = {"class_path": "unidad_pl.PretrainedUNet", "init_args": {"path": str(place / "source")}}
    return exported_with(source, place / "out")


@pytest.fixture(scope="module")
def studio(folder: Path) -> Studio:
    return Studio(folder, device="cpu")


def test_seeds_give_what_unidad_sample_gives(folder: Path, studio: Studio, tmp_path: Path) -> None:
    sample(str(folder), 3, str(tmp_path), seed=5, num_steps=4, device="cpu")
    files = [np.array(Image.open(tmp_path / f"{seed:06d}.png")) for seed in (5, 6, 7)]
    assert (studio.sample(5, 3, 4).permute(0, 2, 3, 1).numpy() == np.stack(files)).all()
    assert (studio.sample(5, 3, 4) != studio.sample(5, 3, 1)).any()


def test_the_source_is_drawn_from_the_same_noise(folder: Path, studio: Studio) -> None:
    from unidad_pl import PretrainedUNet

    found = studio.source_samples(3, 2, 4)
    network = PretrainedUNet(str(folder.parent / "source")).build()
    with torch.no_grad():
        wanted = heun(network, seeded_noise([3, 4], (3, 8, 8), "cpu"), sampling_sigmas(4, sigma_max=80.0))
    assert torch.equal(found, as_uint8(wanted))
    assert str(folder.parent / "source") in studio.original.why
    assert (found != studio.source_samples(3, 2, 5)).any()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "does not say which source"),
        ({"class_path": "unidad_pl.PretrainedUNet", "init_args": {"path": "/nowhere"}}, "not shown: .*nowhere"),
        (
            {"class_path": "os.system", "init_args": {"command": "touch been_here"}},
            "not shown: 'os.system' is no class",
        ),
        ({"class_path": "unidad_pl.NewUNet", "init_args": SMALL | {"resolution": 16}}, "the student another"),
        ({"class_path": "unidad_pl.NewUNet", "init_args": {"colour": 3}}, "not shown: .*colour"),
    ],
)
def test_a_source_that_is_not_there_is_said(
    source: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    studio = Studio(exported_with(source, tmp_path / "out"), device="cpu")
    assert re.search(said, studio.original.why)
    with pytest.raises(ValueError, match=said):
        studio.source_samples(0, 1)
    assert not Path("been_here").exists()
    assert studio.sample(0, 1).shape == (1, 3, 8, 8)


def test_a_card_that_was_edited_is_no_error(folder: Path, tmp_path: Path) -> None:
    for number, text in enumerate(
        ("", "# mine\n", *(f"## Config\n\n```yaml\n{text}\n```\n" for text in ("[[[", "3", "[" * 3000)))
    ):
        copy = shutil.copytree(folder, tmp_path / str(number))
        (copy / "README.md").write_text(text)
        assert "does not say" in Studio(copy, device="cpu").original.why


SOURCE: dict[str, Any] = {"class_path": "unidad_pl.NewUNet", "init_args": SMALL}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("x", "does not say"),
        ({"init_args": [1]}, "does not say"),
        ({"init_args": {"source": "x"}}, "does not say"),
        ({"init_args": {"source": {}}}, "does not say"),
        ({"init_args": {"source": {"init_args": {}}}}, "does not say"),
        ({"init_args": {"source": SOURCE | {"init_args": 3}}}, "init_args of unidad_pl.NewUNet must be a mapping"),
        ({"init_args": {"source": SOURCE | {"class_path": ["x"]}}}, "is no class that this program has imported"),
        ({"init_args": {"source": SOURCE | {"more": 1}}}, "describes none"),
        (
            {"init_args": {"source": {"class_path": "unidad_pl.backbones.lora.LoRA", "init_args": {}}}},
            "not shown: .* describes none",
        ),
        ({"init_args": {"source": SOURCE, "matching": {"guidance_scale": [1]}}}, "guidance_scale must be at least 0"),
        ({"init_args": {"source": SOURCE, "matching": 3}}, "NewUNet"),
    ],
)
def test_a_card_of_other_types_is_a_sentence(model: Any, said: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "README.md").write_text(f"## Config\n\n```yaml\n{json.dumps({'model': model})}\n```\n")
    studio = Studio(copy, device="cpu")
    assert re.search(said, studio.original.why)
    assert studio.sample(0, 1).shape == (1, 3, 8, 8)


def test_a_student_of_many_steps_is_drawn_with_all_of_them(studio: Studio, tmp_path: Path) -> None:
    student = pixel_student()
    student.sampler = FewStepSampler(torch.linspace(80, 0.5, 20))
    many = Studio(export(student, tmp_path / "out"), device="cpu")
    assert (many.most_steps, studio.most_steps) == (20, 16)
    assert torch.equal(many.sample(0, 1), many.sample(0, 1, 20))
    with pytest.raises(ValueError, match=r"num_steps must be in \[1, 20\], got 21"):
        many.sample(0, 1, 21)


def test_a_walk_begins_and_ends_at_its_seeds(studio: Studio) -> None:
    walk = studio.walk(2, 9, 5, 2)
    assert torch.equal(walk[[0, -1]], torch.cat([studio.sample(2, 1, 2), studio.sample(9, 1, 2)]))
    steps = (walk[1:].float() - walk[:-1].float()).abs().mean((1, 2, 3))
    assert (steps > 0).all()
    assert len(studio.walk(4, 4, 2).unique(dim=0)) == 1


def test_what_lies_between_two_noises_is_as_strong_as_they_are() -> None:
    noise = walking_noise(0, 1, 9, (3, 32, 32), "cpu")
    for draw in (noise(), noise()):  # the renoising between the steps walks too
        assert torch.allclose(draw.flatten(1).std(1), torch.ones(9), atol=0.03)
        angles = [float(torch.cosine_similarity(draw[0].flatten(), row.flatten(), dim=0).arccos()) for row in draw]
        assert np.allclose(np.diff(angles[1:]), angles[-1] / 8, atol=0.01)  # exact for ends of one length
    a = torch.tensor([3.0, 4.0])
    assert torch.allclose(slerp(a, -a, 0.25), a / 2)
    assert torch.equal(slerp(a, a, 0.3), a)


def test_classes_and_prompts(tmp_path: Path) -> None:
    classes = Studio(exported_with(None, tmp_path / "classes", num_classes=3), device="cpu")
    assert classes.sample(0, 2).shape == (2, 3, 8, 8)
    assert classes.walk(0, 1, 3).shape == (3, 3, 8, 8)
    student = text_student(tmp_path)
    source = {"class_path": "unidad_pl.StableDiffusion", "init_args": {"path": str(tmp_path / "sd")}}
    student.config = {"model": {"init_args": {"source": source, "matching": {"guidance_scale": 2.0}}}}
    text = Studio(export(student, tmp_path / "text"), device="cpu")
    assert text.takes_prompts
    drawn = text.sample(0, 2, None, "a prt dog")
    assert (drawn != text.sample(0, 2, None, "a cat")).any()
    guided = text.source_samples(0, 1, 2, "a prt dog")
    text.original.guidance_scale = 1.0
    assert (guided != text.source_samples(0, 1, 2, "a prt dog")).any()
    for studio, prompt, said in ((text, None, "write a prompt"), (classes, "a dog", "takes no prompts")):
        with pytest.raises(ValueError, match=said):
            studio.sample(0, 1, None, prompt)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda s: s.sample(0, 0), "count"), (lambda s: s.sample(0, 65), "count"), (lambda s: s.sample(-1, 1), "seed"),
        (lambda s: s.sample(0, 1, 0), "num_steps"), (lambda s: s.sample(0, 1, 17), "num_steps"),
        (lambda s: s.walk(0, 1, 1), "count"), (lambda s: s.walk(0, -1, 2), "last"),
        (lambda s: s.source_samples(0, 1, 0), "steps"), (lambda s: s.sample(10**30, 1), "seed"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_named(call: Any, name: str, studio: Studio) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        call(studio)


def test_help_needs_neither_gradio_nor_torch() -> None:
    code = """import sys
from unidad_pl.cli.main import main
try:
    main(["demo", "--help"])
except SystemExit:
    pass
sys.exit(bool({"torch", "gradio"} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "127.0.0.1" in done.stdout
    assert "--open_browser" in done.stdout


def test_without_gradio_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'unidad_pl\[demo\]'"):
        command.demo(str(folder))
    with pytest.raises(ValueError, match="port must be"):
        command.demo(str(folder), port=0)


@pytest.mark.slow  # gradio takes its time to be imported
def test_the_pages_files_are_the_pictures(studio: Studio, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from unidad_pl.cli import demo_page

    page = demo_page.Page(studio, tmp_path)
    with pytest.raises(demo_page.gr.Error, match="seed must be"):  # which the page shows
        demo_page._in_words(page.sample, ["First seed"])(-1, 2, 2)
    with pytest.raises(demo_page.gr.Error, match="First seed is empty: write a whole number"):
        demo_page._in_words(page.sample, ["First seed"])(None, 2, 2)
    events = [event for one in page.blocks().config["dependencies"] for _, event in one["targets"]]
    assert sorted(events) == ["click", "click", "click", "load"]  # a page that opens shows pictures
    student = pixel_student()
    student.sampler = FewStepSampler(torch.linspace(80, 0.5, 20))
    many = demo_page.Page(Studio(export(student, tmp_path / "many"), device="cpu"), tmp_path)
    assert many._steps().maximum == 20
    pictures, grid = page.sample(3, 10, 2)
    assert [label for _, label in pictures] == [f"seed {s}" for s in range(3, 13)]
    assert pictures[0][0].size == (128, 128)  # enlarged 16 times, no pixel mixed with another
    ours = studio.sample(3, 10, 2)
    assert torch.equal(torch.from_numpy(np.array(pictures[4][0]))[::16, ::16].permute(2, 0, 1), ours[4])
    whole = np.array(Image.open(grid))
    assert whole.shape == (16, 64, 3)
    assert (whole[8:, :8] == ours[8].permute(1, 2, 0).numpy()).all()
    pictures, grid, said = page.compare(3, 2, 2, SOURCE_STEPS)
    assert [label for _, label in pictures] == ["student 3", "source 3", "student 4", "source 4"]
    assert "25 steps" in said
    assert np.array(Image.open(grid)).shape == (18, 16, 3)
    pictures, animation, _ = page.walk(0, 1, 5, 2)
    assert [label for _, label in pictures] == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    with Image.open(animation) as film:
        assert film.n_frames == 8  # there and back, without the ends twice
        assert film.size == (128, 128)


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a running demo."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-u", "-m", "unidad_pl.cli", "demo", "--model", str(folder), "--device", "cpu"]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as run:
        try:
            for _ in range(1500):  # importing gradio and torch, on a busy machine
                if (found := re.search(r"http://127\.0\.0\.1:\d+", (tmp_path / "log").read_text())) is not None:
                    yield found[0]
                    break
                assert run.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            else:
                pytest.fail("the server did not come up: " + (tmp_path / "log").read_text())
        finally:
            run.terminate()


def ask(address: str, name: str, *values: Any) -> Any:
    """The answer of the demo's API; an error of its own is the text of an AssertionError."""
    request = urllib.request.Request(
        f"{address}/gradio_api/call/{name}", json.dumps({"data": values}).encode(), {"Content-Type": "application/json"}
    )
    event = json.load(urllib.request.urlopen(request, timeout=60))["event_id"]
    text = urllib.request.urlopen(f"{address}/gradio_api/call/{name}/{event}", timeout=60).read().decode()
    kind, data = re.findall(r"event: (\w+)\ndata: (.*)", text)[-1]
    assert kind == "complete", data
    return json.loads(data)


@pytest.mark.slow
def test_the_server_draws_over_http(server: str, studio: Studio, tmp_path: Path) -> None:
    pictures, grid = ask(server, "sample", 4, 2, 2)
    assert [one["caption"] for one in pictures] == ["seed 4", "seed 5"]
    with urllib.request.urlopen(grid["url"], timeout=60) as answer, Image.open(answer) as picture:
        assert (np.array(picture)[:, :8] == studio.sample(4, 1, 2)[0].permute(1, 2, 0).numpy()).all()
    pairs, _, said = ask(server, "compare", 0, 1, 2, 3)
    assert len(pairs) == 2
    assert "3 steps" in said
    assert len(ask(server, "walk", 0, 1, 4, 2)[0]) == 4
    with pytest.raises(AssertionError, match="less than minimum value 0"):
        ask(server, "sample", -4, 2, 2)
    with pytest.raises(AssertionError, match="First seed is empty: write a whole number"):
        ask(server, "sample", None, 2, 2)
    with pytest.raises(AssertionError, match="To seed is empty"):
        ask(server, "walk", 0, None, 4, 2)
    printed = (tmp_path / "log").read_text()
    assert f"the demo is at {server}" in printed
    assert "public link" not in printed
    page = urllib.request.urlopen(server, timeout=60).read().decode()
    assert not re.search(r"fonts\.g(oogleapis|static)|googletagmanager", page)

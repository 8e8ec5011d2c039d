"""`unidad sample`: beside others, after damage, and of what cannot be drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.export.made import export, pixel_student
from unidad_pl.cli import drawing as module
from unidad_pl.cli.sample import sample
from unidad_pl.data.pictures import is_whole_png
from unidad_pl.export import load_export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(pixel_student(), tmp_path_factory.mktemp("made") / "out")


def draw(model: Path, num: int, out: Path, **options: Any) -> dict[str, bytes]:
    sample(str(model), num, str(out), device="cpu", **options)
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def test_what_is_cut_short_or_changed_is_drawn_again(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = draw(exported, 5, tmp_path)
    paths = sorted(tmp_path.glob("*.png"))
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:-9])
    paths[2].write_bytes(b"<html></html>")
    changed = bytearray(paths[3].read_bytes())
    changed[60] ^= 4
    paths[3].write_bytes(bytes(changed))
    kept = paths[4].stat().st_mtime_ns
    assert draw(exported, 5, tmp_path, grid=True) == whole | {"grid.png": (tmp_path / "grid.png").read_bytes()}
    assert paths[4].stat().st_mtime_ns == kept
    printed = capsys.readouterr().err
    assert "4 of 5 images are there but cut short or damaged" in printed
    assert "1 of 5 images are there already" in printed
    Image.new("RGB", (3, 3)).save(paths[0])
    with pytest.raises(ValueError, match="images of other sizes"):
        draw(exported, 5, tmp_path, grid=True)


def test_several_draw_into_one_folder_at_once(exported: Path, tmp_path: Path) -> None:
    alone = draw(exported, 8, tmp_path / "alone", batch_size=2)
    failures: list[BaseException] = []

    def one(first: int) -> None:
        try:
            draw(exported, 6, tmp_path / "shared", batch_size=2, seed=first)
        except BaseException as error:  # noqa: BLE001 (shown by the assertion below)
            failures.append(error)

    threads = [threading.Thread(target=one, args=(first,)) for first in (0, 0, 2, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {p.name: p.read_bytes() for p in (tmp_path / "shared").glob("*.png")} == alone
    assert {p.name for p in (tmp_path / "shared").iterdir()} == {*alone, "sampling.json"}


def test_what_a_killed_one_left_is_deleted_by_the_next_that_is_alone(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os\nfrom pathlib import Path\nfrom unidad_pl.files import replacing, sharing\n"
    code += "with sharing(Path('.')), replacing(Path('000001.png')) as part:\n    part.write_text('half')\n"
    code += "    print('here', flush=True)\n    input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == b"here\n"
        foreign = (".notes.part", ".000002.png.0123abcd.partial", "000002.png.0123abcd.part")
        for name in foreign:
            (tmp_path / name).write_text("mine")
        (left,) = tmp_path.glob(".000001.png.*.part")
        draw(exported, 2, tmp_path)
        assert left.read_text() == "half"  # another one is at it
        other.kill()
    assert left.exists()
    write_first = module.write_first

    def begun(path: Path, text: str) -> str:
        assert not left.exists()  # as it begins
        left.write_text("half again")
        return write_first(path, text)

    monkeypatch.setattr(module, "write_first", begun)
    draw(exported, 2, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"000000.png", "000001.png", "sampling.json", *foreign}


def test_of_two_that_want_other_steps_one_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one's record appears after the folder was looked at, and before the own one is written."""
    write_first = module.write_first

    def overtaken(path: Path, text: str) -> str:
        monkeypatch.setattr(module, "write_first", write_first)
        draw(exported, 1, tmp_path, num_steps=1)
        return write_first(path, text)

    monkeypatch.setattr(module, "write_first", overtaken)
    with pytest.raises(ValueError, match="num_steps 1 there, 2 now"):
        draw(exported, 1, tmp_path)
    assert json.loads((tmp_path / "sampling.json").read_text())["num_steps"] == 1


def test_other_noise_levels_are_another_student(exported: Path, tmp_path: Path) -> None:
    draw(exported, 1, tmp_path)
    record = json.loads((tmp_path / "sampling.json").read_text())
    record["sigmas"][-1] += 0.5
    (tmp_path / "sampling.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"holds images drawn otherwise: .*sigmas"):
        draw(exported, 1, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"num_steps": NaN}', "[" * 10_000, "<html>"])
def test_a_damaged_record_is_named(content: str, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "sampling.json").write_text(content)
    with pytest.raises(ValueError, match=r"sampling\.json.*give another --out"):
        draw(exported, 1, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_and_samples_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    student = pixel_student()
    student.network.unet.conv_in.weight[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of its tensors, conv_in\.weight"):
        export(student, tmp_path / "no")
    assert not list(tmp_path.iterdir())
    student = pixel_student()
    student.network.unet.conv_in.weight.fill_(3e38)  # finite, but what it draws is not
    out = export(student, tmp_path / "out")
    with pytest.raises(ValueError, match="draws NaN or infinity at seeds 4 to 5"):
        draw(out, 2, tmp_path / "images", seed=4)
    assert not list((tmp_path / "images").glob("*.png"))


def test_a_prompt_without_the_subjects_token_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for prompts in (["a prt dog", "A PRT, in the snow"], []):
        module._look_for_the_token("prt", prompts)
    module._look_for_the_token(None, ["a dog"])
    assert not capsys.readouterr().err
    module._look_for_the_token("prt", ["a prt dog", "a dog", "a prtx dog"])
    assert "called 'prt', which is not in 'a dog', 'a prtx dog'" in capsys.readouterr().err


def test_home_folders(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(exported)
    sample("~/model", 1, "~/images", device="cpu")
    assert is_whole_png(tmp_path / "images" / "000000.png")
    with pytest.raises(FileNotFoundError, match=r"home/nobody/x\.ckpt|nothing"):
        sample("/home/nobody/x.ckpt", 1, "~/images", device="cpu")


def test_the_pictures_are_what_the_student_draws(exported: Path, tmp_path: Path) -> None:
    draw(exported, 1, tmp_path, seed=3)
    student, generator = load_export(exported), torch.Generator().manual_seed(3)
    with torch.no_grad():
        x = student.network(80 * torch.randn(1, 3, 8, 8, generator=generator), torch.tensor([80.0]))
        x = student.network(x + 0.5 * torch.randn(1, 3, 8, 8, generator=generator), torch.tensor([0.5]))
    seen = torch.from_numpy(np.array(Image.open(tmp_path / "000003.png"))).permute(2, 0, 1)
    assert ((x[0].clamp(-1, 1) + 1) * 127.5 - seen).abs().max() <= 0.51

"""`unidad export` and `unidad sample`: equal images with and without unidad_pl, whole files, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from tests.tiny_sd import save_ddpm
from tests.worlds import Stream, fit, nested, random_images, unidad
from unidad_pl import UniDAD
from unidad_pl.backbones import PretrainedUNet
from unidad_pl.cli.main import main
from unidad_pl.cli.sample import sample
from unidad_pl.export import export_student as export
from unidad_pl.export import load_export
from unidad_pl.runs.config import build_module
from unidad_pl.runs.student import load_student

pytestmark = pytest.mark.slow

ALONE = """
import json, sys
class Blocker:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "unidad_pl":
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import torch
from diffusers import DiffusionPipeline
for kind, jobs in json.loads(sys.argv[1]).items():
    pipe = DiffusionPipeline.from_pretrained(f"{kind}/out", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    made = []
    for seeds, steps, how in jobs:
        given = {"seeds": seeds}
        if how == "generators":
            given = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
        made.append(pipe(**given, num_inference_steps=steps, output_type="pt").images)
    torch.save(made, f"{kind}/made.pt")
    pipe.to(torch.bfloat16)
    assert pipe(batch_size=2).images[0].size == (16, 16)
    assert pipe(seeds=[1], output_type="np", return_dict=False)[0].shape == (1, 16, 16, 3)
    for wrong in ({"seeds": [1], "generator": torch.Generator()}, {"num_inference_steps": 0}, {"output_type": "jpg"}):
        try:
            pipe(**wrong)
        except ValueError:
            continue
        raise SystemExit(f"{kind}: {wrong} was accepted")
"""


V = dict(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
SOURCES: dict[str, Any] = {"ddpm": {}, "v": V, "classes": dict(classes=3), "edm": None}


def train(folder: Path, kind: str = "ddpm", **options: Any) -> Path:
    """A run folder with a config and a checkpoint after 2 iterations; returns the checkpoint."""
    source: Any = {"class_path": "unidad_pl.backbones.PretrainedUNet", "init_args": {"path": str(folder / "m")}}
    if SOURCES[kind] is None:
        arguments = dict(resolution=16, channels=[8, 16], attention_levels=[1], head_channels=8, norm_groups=4)
        source = {"class_path": "unidad_pl.backbones.NewUNet", "init_args": arguments}
    else:
        save_ddpm(folder / "m", **SOURCES[kind])
    settings = dict(source=source, student__update_every=1, student__optimizer__lr=1.0e-3, student__optimizer__warmup=0)
    options = nested(**(settings | dict(training__ema_decay=0.5) | options))
    config = {"seed_everything": 0, "model": {"class_path": "unidad_pl.modules.UniDAD", "init_args": options},
              "data": {"class_path": "x", "init_args": {"root": "photos/dogs", "shots": 10}}}  # fmt: skip
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    path = folder / "checkpoints" / "last.ckpt"
    fit(build_module(config, "config.yaml"), 2, Stream(random_images(4))).save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("ddpm") / "run")


def pixels(folder: Path, seeds: Any) -> Tensor:
    pictures = [torch.from_numpy(np.array(Image.open(folder / f"{seed:06d}.png"))) for seed in seeds]
    return torch.stack(pictures).permute(0, 3, 1, 2)


JOBS = [[[3, 4, 5], steps, how] for steps, how in ((None, ""), (1, ""), (2, "generators"), (4, ""))]
JOBS += [[[4], None, ""]]
KINDS = {"v": JOBS, "classes": [JOBS[0], JOBS[-1]], "edm": [JOBS[0], JOBS[-1]]}
"""The number of steps and the kind of seed are the pipeline's affair, whatever its network predicts."""


@pytest.fixture(scope="module")
def drawn_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind: a run, its export, and what a process that cannot import unidad_pl drew with that."""
    place = tmp_path_factory.mktemp("alone")
    for kind in KINDS:
        options = {"training__classes": [0, 2]} if kind == "classes" else {}
        export(str(train(place / kind / "run", kind, **options)), str(place / kind / "out"))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(KINDS)], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for complaint in ("ignored", "cannot get type"):
        assert complaint not in done.stderr, done.stderr
    return place


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_process_without_unidad_pl_draws_the_same_images(kind: str, drawn_alone: Path, tmp_path: Path) -> None:
    here = drawn_alone / kind
    made = torch.load(here / "made.pt", weights_only=True)
    for images, (seeds, steps, _) in zip(made, KINDS[kind], strict=True):
        for model, batch in ((here / "out", 2), (here / "run" / "checkpoints" / "last.ckpt", 5)):
            folder = tmp_path / f"{model.name}{steps}{len(seeds)}"
            sample(str(model), len(seeds), str(folder), seed=seeds[0], num_steps=steps, batch_size=batch)
            assert (images * 255 - pixels(folder, seeds)).abs().max() <= 1.0
    torch.testing.assert_close(made[0][1:2], made[-1], rtol=0, atol=1e-4)  # image 4 is the same in any batch


def test_the_exported_weights_are_the_chosen_ones(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    for weights, prefix in (("ema", "ema.module."), ("raw", "student."), ("auto", "ema.module.")):
        export(str(checkpoint), str(tmp_path / "out"), weights)  # an earlier export is replaced
        for name, value in load_export(tmp_path / "out").network.state_dict().items():
            torch.testing.assert_close(value, state[prefix + name], rtol=0, atol=0)


def test_an_exported_student_starts_another_run(drawn_alone: Path) -> None:
    student = load_student(drawn_alone / "edm" / "run" / "checkpoints" / "last.ckpt").network
    source = PretrainedUNet(str(drawn_alone / "edm" / "out"))
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([80.0, 0.5])
    torch.testing.assert_close(source.build()(x, sigma), student(x, sigma), rtol=0, atol=0)
    fit(unidad(source, student__init_from=source), 1, Stream(random_images(4)))


def test_the_model_card_has_what_a_reader_needs(tmp_path: Path) -> None:
    checkpoint = train(tmp_path / "run", student__num_steps=2)
    record = {"metric": "FID", "values": {"fid": 12.5}, "stage": "test", "step": 2, "samples": 7}
    record["extractor"] = "inception"
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    main(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("license:", "# dogs", "2-step", "| fid | 12.5 | test | 2 | 7 | inception |", "iteration 2, ema",
                 "seed: 0", f"torch {torch.__version__.split('+')[0]}", "update_every: 1", "80, 0.5"):  # fmt: skip
        assert text in card, text
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers"


def test_sampling_resumes_and_never_mixes(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    sample(str(checkpoint), 3, str(out))
    first = (out / "000002.png").stat().st_mtime_ns
    sample(str(checkpoint), 3, str(out), seed=2, grid=True)
    assert "1 of 3 images are there already" in capsys.readouterr().err
    assert (out / "000002.png").stat().st_mtime_ns == first
    assert sorted(p.name for p in out.glob("0*.png")) == [f"{i:06d}.png" for i in range(5)]
    assert Image.open(out / "grid.png").size == (32, 32)
    sample(str(checkpoint), 1, str(tmp_path / "more"), num_steps=5, device="cpu")
    assert "trained for 3 steps; 5" in capsys.readouterr().err
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "000000.png").write_bytes(b"")
    wrong: tuple[tuple[int, Path, dict[str, Any], str], ...] = (
        (3, out, dict(num_steps=2), "num_steps 3 there, 2 now"), (3, out, dict(weights="raw"), "weights_sha256"),
        (1, tmp_path / "strange", {}, r"no sampling\.json"), (0, out, {}, "num must be at least 1, got 0"),
        (1, out, dict(seed=-1), "seed"),
    )  # fmt: skip
    for num, folder, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            sample(str(checkpoint), num, str(folder), **options)


def test_class_labels_are_taken_in_turn(drawn_alone: Path, tmp_path: Path) -> None:
    checkpoint = drawn_alone / "classes" / "run" / "checkpoints" / "last.ckpt"
    main(["sample", "--model", str(checkpoint), "--num", "3", "--out", str(tmp_path / "own"), "--grid"])
    sample(str(checkpoint), 3, str(tmp_path / "same"), class_labels=[0, 2])
    sample(str(checkpoint), 3, str(tmp_path / "other"), class_labels=[1])
    own, same, other = (pixels(tmp_path / name, range(3)) for name in ("own", "same", "other"))
    assert torch.equal(own, same)
    assert not torch.equal(own, other)
    with pytest.raises(ValueError, match=r"some of 0\.\.2, got \[3\]"):
        sample(str(checkpoint), 1, str(tmp_path / "wrong"), class_labels=[3])


def test_what_cannot_be_exported_is_refused_with_its_name(tmp_path: Path) -> None:
    checkpoint = train(tmp_path / "run", training__ema_decay=0.0)
    out, own = str(tmp_path / "out"), tmp_path / "run" / "config.yaml"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    content = torch.load(checkpoint, weights_only=True)
    elsewhere = tmp_path / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    del content["state_dict"]["student.unet.conv_in.weight"]
    torch.save(content, elsewhere / "part.ckpt")
    (elsewhere / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:1000])
    torch.save({"state_dict": Path("x")}, elsewhere / "code.ckpt")
    source = yaml.safe_load(own.read_text())["model"]["init_args"]["source"]
    plain = {"class_path": "unidad_pl.modules.Diffusion", "init_args": {"source": source}}
    refused: tuple[tuple[Path, dict[str, Any], type[Exception], str], ...] = (
        (checkpoint, dict(weights="ema"), ValueError, "no average of the weights"),
        (checkpoint, dict(weights="best"), ValueError, "weights must be"),
        (tmp_path / "nowhere.ckpt", {}, FileNotFoundError, "nowhere"),
        (checkpoint, dict(out=str(tmp_path / "taken")), FileExistsError, "no earlier export"),
        (elsewhere / "part.ckpt", {}, ValueError, r"unet\.conv_in\.weight"),  # it holds its module's arguments
        (elsewhere / "part.ckpt", dict(config=str(own)), ValueError, r"unet\.conv_in\.weight"),
        (elsewhere / "cut.ckpt", {}, ValueError, "cut short"),
        (elsewhere / "code.ckpt", {}, ValueError, "may carry code"),
    )
    for path, options, error, message in refused:
        with pytest.raises(error, match=message):
            export(str(path), **(dict(out=out) | options))
    boring = "lightning.pytorch.demos.boring_classes.BoringModel"
    for text, message in (
        ("[", "no readable config"), ("a: 1", "no entry 'model'"), ("model: {class_path: nowhere.X}", "refused"),
        (json.dumps({"model": plain}), "no few-step student"),
        (f"model: {{class_path: {boring}}}", r"BoringModel .* not one of unidad_pl's modules"),
    ):  # fmt: skip
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            export(str(checkpoint), out, config=str(tmp_path / "bad.yaml"))
    with pytest.raises(ValueError, match=r"neither a checkpoint nor a directory.*: no model_index\.json$"):
        sample(str(tmp_path / "taken"), 1, out)
    (tmp_path / "taken" / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"it is a run's: give one of its checkpoints, such as checkpoints/last\.ckpt"):
        sample(str(tmp_path / "taken"), 1, out)
    with pytest.raises(FileNotFoundError, match="taken', which is a folder: give a file in it"):
        export(str(tmp_path / "taken"), out)
    assert issubclass(UniDAD, pl.LightningModule)  # as the boring one is
    assert not Path(out).exists()
    assert not list(tmp_path.glob("*.part*"))

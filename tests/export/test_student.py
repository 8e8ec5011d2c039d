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
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from tests.worlds import Stream, fit, groups, nested, random_images
from unidad_pl import UniDAD
from unidad_pl.backbones import PretrainedUNet
from unidad_pl.cli.main import main
from unidad_pl.cli.sample import sample
from unidad_pl.export import export_student as export
from unidad_pl.export import load_export
from unidad_pl.runs.student import load_student

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


def like_google_ddpm(folder: Path, **scheduler: Any) -> None:
    """A pipeline folder in the layout of google/ddpm-*, with random weights."""
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, num_class_embeds=scheduler.pop("classes", None),
    ).save_pretrained(folder / "unet")  # fmt: skip
    DDPMScheduler(**scheduler).save_pretrained(folder / "scheduler")


SOURCES: dict[str, Any] = {
    "ddpm": {},
    "v": dict(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "classes": dict(classes=3),
    "edm": None,
}


def train(folder: Path, kind: str = "ddpm", **options: Any) -> Path:
    """A run folder with a config and a checkpoint after 2 iterations; returns the checkpoint."""
    source: dict[str, Any] = {
        "class_path": "unidad_pl.backbones.PretrainedUNet",
        "init_args": {"path": str(folder / "m")},
    }
    if SOURCES[kind] is None:
        arguments = dict(resolution=16, channels=[8, 16], attention_levels=[1], head_channels=8, norm_groups=4)
        source = {"class_path": "unidad_pl.backbones.NewUNet", "init_args": arguments}
    else:
        like_google_ddpm(folder / "m", **SOURCES[kind])
    setting = {"lr": 1.0e-3, "warmup": 0}
    options = nested(
        **(dict(source=source, student__update_every=1, student__optimizer=setting, training__ema_decay=0.5) | options)
    )
    config = {"seed_everything": 0, "model": {"class_path": "unidad_pl.modules.UniDAD", "init_args": options},
              "data": {"class_path": "x", "init_args": {"root": "photos/dogs", "shots": 10}}}  # fmt: skip
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    from unidad_pl.runs.config import load_module

    trainer = fit(load_module(folder / "config.yaml"), 2, Stream(random_images(4, 16)))
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder / "checkpoints" / "last.ckpt"


def pixels(folder: Path, seeds: Any) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(folder / f"{s:06d}.png"))) for s in seeds]).permute(
        0, 3, 1, 2
    )


JOBS = [[[3, 4, 5], steps, how] for steps, how in ((None, ""), (1, ""), (2, "generators"), (4, ""))]
JOBS += [[[4], None, ""]]
KINDS = {"v": JOBS, "classes": [job for job in JOBS if job[2] != "generators"], "edm": JOBS}


@pytest.fixture(scope="module")
def drawn_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind: a run, its export, and what a process that cannot import unidad_pl drew with that."""
    place = tmp_path_factory.mktemp("alone")
    for kind in KINDS:
        export(str(train(place / kind / "run", kind)), str(place / kind / "out"))
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


def test_the_exported_weights_are_the_chosen_ones(tmp_path: Path) -> None:
    checkpoint = train(tmp_path / "run")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    for weights, prefix in (("ema", "ema.module."), ("raw", "student."), ("auto", "ema.module.")):
        export(str(checkpoint), str(tmp_path / "out"), weights)  # an earlier export is replaced
        network = load_export(tmp_path / "out").network
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, state[prefix + name], rtol=0, atol=0)


def test_an_exported_student_starts_another_run(tmp_path: Path) -> None:
    checkpoint = train(tmp_path / "run", "edm")
    export(str(checkpoint), str(tmp_path / "out"))
    student = load_student(checkpoint).network
    again = PretrainedUNet(str(tmp_path / "out")).build()
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([80.0, 0.5])
    torch.testing.assert_close(again(x, sigma), student(x, sigma), rtol=0, atol=0)
    source = PretrainedUNet(str(tmp_path / "out"))
    fit(UniDAD(source, **groups(student__init_from=source)), 1, Stream(random_images(4, 16)))


def test_the_model_card_has_what_a_reader_needs(tmp_path: Path) -> None:
    checkpoint = train(tmp_path / "run", student__num_steps=2)
    record = {
        "metric": "FID",
        "values": {"fid": 12.5},
        "stage": "test",
        "step": 2,
        "samples": 7,
        "extractor": "inception",
    }
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    main(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("license:", "# dogs", "2-step", "| fid | 12.5 | test | 2 | 7 | inception |", "iteration 2, ema",
                 "seed: 0", f"torch {torch.__version__.split('+')[0]}", "update_every: 1", "80, 0.5"):  # fmt: skip
        assert text in card, text
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers"


def test_sampling_resumes_and_never_mixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = train(tmp_path / "run")
    out = tmp_path / "out"
    sample(str(checkpoint), 3, str(out))
    first = (out / "000002.png").stat().st_mtime_ns
    sample(str(checkpoint), 3, str(out), seed=2, grid=True)
    assert "1 of 3 images are there already" in capsys.readouterr().err
    assert (out / "000002.png").stat().st_mtime_ns == first
    assert sorted(p.name for p in out.glob("0*.png")) == [f"{i:06d}.png" for i in range(5)]
    assert Image.open(out / "grid.png").size == (32, 32)
    with pytest.raises(ValueError, match="num_steps 3 there, 2 now"):
        sample(str(checkpoint), 3, str(out), num_steps=2)
    with pytest.raises(ValueError, match="weights_sha256"):
        sample(str(checkpoint), 3, str(out), weights="raw")
    sample(str(checkpoint), 1, str(tmp_path / "more"), num_steps=5, device="cpu")
    assert "trained for 3 steps; 5" in capsys.readouterr().err
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "000000.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no sampling\.json"):
        sample(str(checkpoint), 1, str(tmp_path / "strange"))
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        sample(str(checkpoint), 0, str(out))
    with pytest.raises(ValueError, match="seed"):
        sample(str(checkpoint), 1, str(out), seed=-1)


def test_class_labels_are_taken_in_turn(tmp_path: Path) -> None:
    checkpoint = train(tmp_path / "run", "classes", training__classes=[0, 2])
    main(["sample", "--model", str(checkpoint), "--num", "3", "--out", str(tmp_path / "own"), "--grid"])
    sample(str(checkpoint), 3, str(tmp_path / "same"), class_labels=[0, 2])
    sample(str(checkpoint), 3, str(tmp_path / "other"), class_labels=[1])
    assert torch.equal(pixels(tmp_path / "own", range(3)), pixels(tmp_path / "same", range(3)))
    assert not torch.equal(pixels(tmp_path / "own", range(3)), pixels(tmp_path / "other", range(3)))
    with pytest.raises(ValueError, match=r"some of 0\.\.2, got \[3\]"):
        sample(str(checkpoint), 1, str(tmp_path / "wrong"), class_labels=[3])


def test_what_cannot_be_exported_is_refused_with_its_name(tmp_path: Path) -> None:
    checkpoint = train(tmp_path / "run", training__ema_decay=0.0)
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="no average of the weights"):
        export(str(checkpoint), out, "ema")
    with pytest.raises(ValueError, match="weights must be"):
        export(str(checkpoint), out, "best")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export(str(tmp_path / "nowhere.ckpt"), out)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="no earlier export"):
        export(str(checkpoint), str(tmp_path / "taken"))
    content = torch.load(checkpoint, weights_only=True)
    moved = tmp_path / "elsewhere" / "deep" / "a.ckpt"
    moved.parent.mkdir(parents=True)
    del content["state_dict"]["student.unet.conv_in.weight"]
    torch.save(content, moved)
    with pytest.raises(FileNotFoundError, match="give it as --config"):
        export(str(moved), out)
    with pytest.raises(ValueError, match=r"unet\.conv_in\.weight"):
        export(str(moved), out, config=str(tmp_path / "run" / "config.yaml"))
    moved.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short"):
        export(str(moved), out)
    torch.save({"state_dict": Path("x")}, moved)
    with pytest.raises(ValueError, match="may carry code"):
        export(str(moved), out)
    for text, message in (
        ("[", "not YAML"),
        ("a: 1", "no entry 'model'"),
        ("model: {class_path: nowhere.X}", "refused"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            export(str(checkpoint), out, config=str(tmp_path / "bad.yaml"))
    with pytest.raises(ValueError, match="neither a checkpoint nor a directory"):
        sample(str(tmp_path / "taken"), 1, out)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["model"] = {"class_path": "unidad_pl.modules.Diffusion",
                       "init_args": {"source": config["model"]["init_args"]["source"]}}  # fmt: skip
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="no few-step student"):
        export(str(checkpoint), out, config=str(tmp_path / "bad.yaml"))
    assert not Path(out).exists()
    assert not list(tmp_path.glob("*.part*"))


def test_other_peoples_modules_are_refused(tmp_path: Path) -> None:
    checkpoint = train(tmp_path / "run")
    (tmp_path / "bad.yaml").write_text("model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}")
    with pytest.raises(ValueError, match=r"BoringModel .* not one of unidad_pl's modules"):
        load_student(checkpoint, config=str(tmp_path / "bad.yaml"))
    assert issubclass(UniDAD, pl.LightningModule)

"""A subject's run from its config to plain diffusers: fit, test, export, sample, and back as a starting student."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image

from tests.tiny_sd import save_tiny
from tests.worlds import save_pictures
from unidad_pl.backbones import StableDiffusion
from unidad_pl.cli.errors import Refused
from unidad_pl.cli.main import main
from unidad_pl.cli.sample import sample
from unidad_pl.export import export_student as export
from unidad_pl.export import load_export
from unidad_pl.export.card import model_card
from unidad_pl.runs.config import build_module, read_config
from unidad_pl.runs.student import load_student
from unidad_pl.training.networks import content_hash

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NO_METRICS = CONFIGS / "trainer" / "no_metrics.yaml"
PROMPT = "a prt dog"
FIRST = pytest.mark.parametrize("place", ["1.x"], indirect=True)
XL = pytest.mark.parametrize("place", ["xl"], indirect=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each kind is made once, in whatever order the tests ask for them."""

    @cache
    def make(kind: str) -> Path:
        place = tmp_path_factory.mktemp("run")
        save_tiny(place / "sd", xl=kind == "xl")
        if kind == "xl":  # SDXL's default is True
            index = place / "sd" / "model_index.json"
            index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
        save_pictures(place / "dog6", 2)
        return place

    return make


@pytest.fixture(params=["1.x", "xl"])
def place(request: pytest.FixtureRequest, places: Callable[[str], Path]) -> Path:
    return places(request.param)


def begin(config: str, photos: Path, *options: str) -> None:
    """A config on the CPU, without metrics, prompts of DreamBooth and a folder that is named after its subject."""
    main(["fit", "--config", str(CONFIGS / config), "--config", str(NO_METRICS), "--trainer.accelerator", "cpu",
          "--data.root", str(photos), "--data.prompts.dreambooth", "null", "--data.class_word", "dog",
          *options])  # fmt: skip


def fit(place: Path, name: str, *options: str, config: str = "sdp_dreambooth.yaml") -> Path:
    """Two iterations of the config on tiny files; the last checkpoint."""
    begin(
        config, place / "dog6", "--model.source.init_args.path", str(place / "sd"), "--data.resolution", "16",
        "--data.evaluation.samples_per_prompt", "2", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2",
        "--trainer.logger.init_args.save_dir", str(place / name), "--trainer.enable_progress_bar", "false",
        "--model.student.optimizer.lr", "0.01", "--model.student.optimizer.warmup", "0", *options,
    )  # fmt: skip
    (found,) = (place / name).rglob("last.ckpt")
    return found


def distance(one: Any, other: Any) -> float:
    """The largest difference of two pictures of 0 to 255."""
    return float(np.abs(np.asarray(one, dtype=np.float32) - np.asarray(other, dtype=np.float32)).max())


@pytest.fixture
def checkpoint(place: Path) -> Path:
    found = list((place / "run").rglob("last.ckpt"))  # one fit for every test of this kind
    larger = ("--model.source.init_args.resolution", "24", "--data.resolution", "24")  # than the source's own 16
    own = larger if (place / "sd" / "text_encoder_2").exists() else ()
    return found[0] if found else fit(place, "run", "--model.training.ema_decay", "0.9", *own)


def changed(checkpoint: Path, name: str, source: dict[str, Any] | None = None, **student: Any) -> Path:
    """The config of the run with other settings of its student: the same weights go with it."""
    settings = yaml.safe_load((checkpoint.parents[1] / "config.yaml").read_text())
    arguments = settings["model"]["init_args"]
    arguments["student"] |= student
    arguments["source"]["init_args"] |= source or {}
    (checkpoint.parent / name).write_text(yaml.safe_dump(settings))
    return checkpoint.parent / name


@pytest.mark.parametrize(("place", "steps"), [("1.x", 1), ("xl", 3)], indirect=["place"])
def test_plain_diffusers_draws_what_sample_draws(place: Path, checkpoint: Path, steps: int) -> None:
    """The weights are the same for any number of steps: the run's config says how many."""
    config = changed(checkpoint, f"{steps}.yaml", num_steps=steps)
    out = export(str(checkpoint), str(place / f"export{steps}"), config=str(config))
    student = load_student(checkpoint, config=str(config))
    assert content_hash(student.network) == content_hash(load_export(out).network)
    assert content_hash(student.network) != content_hash(StableDiffusion(str(place / "sd")).build())

    seeds = [5, 6, 7]
    for name, model, own in (("ckpt", checkpoint, str(config)), ("folder", out, None)):
        folder = str(place / f"{name}{steps}")
        sample(str(model), 3, folder, seed=5, prompts=[PROMPT], batch_size=2, device="cpu", config=own)
    pipe = DiffusionPipeline.from_pretrained(out)
    assert isinstance(pipe.scheduler, LCMScheduler)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = pipe([PROMPT] * 3, num_inference_steps=steps, guidance_scale=1.0, generator=generators).images
    trained = [round(s, 6) for s in student.sampler.sigmas]
    assert trained == [round(float(student.network.native_sigmas[t]), 6) for t in pipe.scheduler.timesteps.tolist()]
    for seed, picture in zip(seeds, drawn, strict=True):
        for name in ("ckpt", "folder"):
            assert distance(Image.open(place / f"{name}{steps}" / f"{seed:06d}.png"), picture) <= 2
    assert distance(drawn[0], drawn[1]) > 2


@XL
def test_an_export_draws_at_the_resolution_of_its_training(place: Path, checkpoint: Path) -> None:
    """The source's own size is 16 pixels: a pipeline takes that unless its UNet says otherwise."""
    out = export(str(checkpoint), str(place / "sized_export"))
    card = model_card(load_student(checkpoint), "last.ckpt", adapters=True)
    sample(str(out), 1, str(place / "sized_ours"), seed=5, prompts=[PROMPT], device="cpu")
    pipe = DiffusionPipeline.from_pretrained(out)
    theirs = pipe(PROMPT, num_inference_steps=1, guidance_scale=1.0, generator=torch.Generator().manual_seed(5)).images
    ours = Image.open(place / "sized_ours" / "000005.png")
    assert np.asarray(ours).shape == (24, 24, 3)
    assert distance(ours, theirs[0]) <= 2
    assert "size = dict(height=24, width=24)" in card
    assert pipe.config.get("force_zeros_for_empty_prompt", False) is False  # as of its source
    assert list((place / "run").rglob("samples/val_step00000002.png"))


@FIRST
def test_fit_test_and_pictures_of_the_config(place: Path, checkpoint: Path) -> None:
    main(["test", "--config", str(checkpoint.parents[1] / "config.yaml"), "--ckpt_path", str(checkpoint),
          "--trainer.logger.init_args.save_dir", str(place / "run")])  # fmt: skip
    assert list((place / "run").rglob("samples/val_step00000002.png"))
    assert list((place / "run").rglob("samples/test_step00000002.png"))


@FIRST
def test_an_exported_student_starts_another_run_and_its_card_says_how_to_draw(place: Path, checkpoint: Path) -> None:
    out = export(str(checkpoint), str(place / "start"))
    card = (out / "README.md").read_text()
    assert "pipe('a prt dog', num_inference_steps=1, guidance_scale=1.0)" in card
    assert "pipeline_tag: text-to-image" in card
    start = {"class_path": "unidad_pl.backbones.StableDiffusion", "init_args": {"path": str(out)}}
    config = changed(checkpoint, "second.yaml", init_from=start)
    module = build_module(read_config(str(config)), str(config))
    module.configure_model()
    assert content_hash(module.student) == content_hash(load_export(out).network)
    assert content_hash(module.fake_score) != content_hash(module.student)


@FIRST
def test_steps_between_the_timesteps_are_kept_but_not_exported(place: Path, checkpoint: Path) -> None:
    config = str(changed(checkpoint, "free.yaml", {"spacing": "log_linear"}, num_steps=2, sigma_max=14.6146))
    assert load_student(checkpoint, config=config).sampler.sigmas == pytest.approx([14.6146, 0.5], rel=0.01)
    with pytest.raises(ValueError, match="evenly spaced timesteps only"):
        export(str(checkpoint), str(place / "no"), config=config)
    assert not (place / "no").exists()


@FIRST
def test_sample_asks_for_prompts_and_keeps_apart_what_they_drew(
    place: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="give --prompts"):
        sample(str(checkpoint), 1, str(place / "none"), device="cpu")
    assert load_student(checkpoint).token == "prt"
    sample(str(checkpoint), 2, str(place / "mine"), prompts=[PROMPT, "a cat"], device="cpu")
    assert json.loads((place / "mine" / "sampling.json").read_text())["prompts"] == [PROMPT, "a cat"]
    assert "subject is called 'prt', which is not in 'a cat'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="images drawn otherwise"):
        sample(str(checkpoint), 2, str(place / "mine"), prompts=[PROMPT], device="cpu")


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("sd[px]*.yaml")))
def test_a_config_without_its_files_says_which_go_where(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "dog6", 1)
    path = yaml.safe_load((CONFIGS / config).read_text())["model"]["init_args"]["source"]["init_args"]["path"]
    assert path in (CONFIGS / config).read_text().split("unidad fit")[0]
    with pytest.raises(Refused) as ending:
        begin(config, Path("dog6"))
    assert re.search(rf"'{path}'.*--model.source.init_args.path.*hf download", str(ending.value))


def test_the_configs_of_adapters_train_and_export_them(place: Path) -> None:
    xl = "XL" in (place / "sd" / "model_index.json").read_text()
    checkpoint = fit(place, "lora", config="sdp_sdxl_lora.yaml" if xl else "sdp_lora.yaml")
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all("lora_" in name for name in stored if ".unet." in name)
    out = export(str(checkpoint), str(place / "adapters"), adapters=True)
    DiffusionPipeline.from_pretrained(place / "sd").load_lora_weights(out)
    assert len(LCMScheduler.from_pretrained(out, subfolder="scheduler").timesteps) >= 1

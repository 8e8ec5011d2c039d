"""Students that start from another model than their teachers: a distilled one of the same kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel

from tests.metrics.toys import refused
from tests.tiny_sd import save_unet, text_unidad
from tests.worlds import tiny_unet, unidad
from unidad_pl import StableDiffusion
from unidad_pl.denoiser import GivenDenoiser
from unidad_pl.runs.config import build_module

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "sdxl_dmd2.yaml"


def test_dmd2s_student_goes_on_from_its_file_and_the_others_from_sdxl(tmp_path: Path) -> None:
    folder, file = save_unet(tmp_path / "xl", xl=True), tmp_path / "dmd2.bin"
    base = UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.save({name: value + 1 for name, value in base.state_dict().items()}, file)
    config = yaml.safe_load(CONFIG.read_text())
    options = config["model"]["init_args"]
    sources = options["source"], options["student"]["init_from"]
    for source in sources:
        source["init_args"] |= {"path": str(folder), "lora": {"rank": 2}}
    sources[1]["init_args"]["unet_weights"] = str(file)
    module = build_module({"model": config["model"]}, str(CONFIG))
    module.configure_model()
    frozen = {name: dict(getattr(module, name).named_parameters()) for name in ("student", "fake_score")}
    for name, weight in base.conv_in.named_parameters():
        torch.testing.assert_close(frozen["student"][f"unet.conv_in.{name}"], weight + 1)
        assert torch.equal(frozen["fake_score"][f"unet.conv_in.{name}"], weight)
    shared = dict(module.target_teacher.named_parameters())
    assert all(shared[name] is frozen["fake_score"][name] for name in module.fake_score.shared_weights)
    table = module.student.native_sigmas
    assert module.sampler.sigmas == pytest.approx([float(table[t]) for t in (999, 749, 499, 249)])


@pytest.mark.parametrize("role", ["student__init_from", "fake_score__init_from", "target_teacher__init_from"])
def test_models_of_other_images_or_classes_are_refused(role: str) -> None:
    for other in (tiny_unet(resolution=32), tiny_unet(image_channels=1), tiny_unet(num_classes=3)):
        module = unidad(**{role: other})
        refused("init_from has a model of images .* the source is one of images", module.configure_model)


def test_models_that_read_other_texts_are_refused(tmp_path: Path) -> None:
    sd, xl = save_unet(tmp_path / "sd"), save_unet(tmp_path / "xl", xl=True)
    module = text_unidad(sd, student__init_from=StableDiffusion(str(xl)))
    refused("tokens 28, pooled 12, the source is one of .* tokens 16", module.configure_model)


def test_a_distilled_source_is_warned_of() -> None:
    network = tiny_unet().build()
    unidad(GivenDenoiser(network)).configure_model()
    network.distilled = True
    with pytest.warns(UserWarning, match=r"the source model was distilled .* as student\.init_from"):
        unidad(GivenDenoiser(network)).configure_model()

"""An export in diffusers' hands: saved again, offloaded, in half precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from tests.export.made import export, pixel_student, text_student
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Codec
from unidad_pl.export import load_export

WEIGHTS = "diffusion_pytorch_model.safetensors"


def opened(folder: Path, **options: Any) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, seeds: tuple[int, ...] = (1, 2)) -> Tensor:
    return pipe(seeds=seeds, output_type="pt").images


@pytest.mark.parametrize("options", [{}, {"prediction": "v_prediction", "num_classes": 3}], ids=["edm", "v classes"])
def test_what_diffusers_saves_again_draws_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    student = pixel_student(**options)
    pipe = opened(export(student, tmp_path / "out"))
    pipe.save_pretrained(tmp_path / "once")
    again = opened(tmp_path / "once")
    again.save_pretrained(tmp_path / "twice")
    again.save_pretrained(tmp_path / "twice")  # over itself
    for folder in ("once", "twice"):
        assert torch.equal(drawn(opened(tmp_path / folder)), drawn(pipe))
        loaded = load_export(tmp_path / folder)
        assert (loaded.weights, loaded.iteration, loaded.sampler.sigmas) == ("ema", 7, [80.0, 0.5])
        x, sigma = torch.randn(1, 3, 8, 8), torch.tensor([2.0])
        cond = Condition(torch.tensor([1])) if options else None
        torch.testing.assert_close(loaded.network(x, sigma, cond), student.network(x, sigma, cond), rtol=0, atol=0)


def test_offloading_keeps_the_pictures_and_its_hooks(tmp_path: Path) -> None:
    pipe = opened(export(pixel_student(), tmp_path / "out"))
    before = drawn(pipe)
    assert type(pipe).model_cpu_offload_seq == "unet->transformer->vae"
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        (hook,) = pipe._all_hooks
        assert torch.equal(drawn(pipe), before)
        assert pipe._all_hooks[0] is not hook  # offloaded, and set up for the next call
        assert hasattr(pipe.unet, "_hf_hook")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_half_the_bytes_and_near(dtype: torch.dtype, tmp_path: Path) -> None:
    student, name = pixel_student(), str(dtype).removeprefix("torch.")
    whole, half = export(student, tmp_path / "whole"), export(student, tmp_path / "half", dtype=name)
    assert {value.dtype for value in load_file(half / "unet" / WEIGHTS).values()} == {dtype}
    sizes = [(folder / "unet" / WEIGHTS).stat().st_size for folder in (half, whole)]
    assert sizes[0] < 0.6 * sizes[1]
    for options in ({}, {"torch_dtype": dtype}):
        assert (drawn(opened(half, **options)) - drawn(opened(whole))).abs().max() < 0.01
    assert {value.dtype for value in load_export(half).network.state_dict().values()} == {torch.float32}
    assert {value.dtype for value in student.network.state_dict().values()} == {torch.float32}


def test_weights_beyond_half_precision_are_named(tmp_path: Path) -> None:
    student = pixel_student()
    student.network.unet.conv_in.weight[0] = 1e5
    with pytest.raises(ValueError, match=r"unet in torch\.float16 has .*conv_in\.weight.*bfloat16 or float32"):
        export(student, tmp_path / "out", dtype="float16")
    export(student, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        export(student, tmp_path / "other", dtype="int8")


def test_a_text_pipeline_in_half_precision_and_its_token(tmp_path: Path) -> None:
    student = text_student(tmp_path)
    whole, half = export(student, tmp_path / "whole"), export(student, tmp_path / "half", dtype="float16")
    for part in ("unet", "vae"):
        assert {value.dtype for value in load_file(half / part / WEIGHTS).values()} == {torch.float16}
    assert load_export(half).token == "prt"
    pictures = []
    for folder in (whole, half):
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        pictures.append(pipe("a prt dog", num_inference_steps=2, guidance_scale=1.0, generator=generator).images[0])
    distance = np.asarray(pictures[0], dtype=float) - np.asarray(pictures[1], dtype=float)
    assert np.abs(distance).max() <= 8
    index = json.loads((half / "model_index.json").read_text())
    index["vae"] = ["antigravity", "AutoencoderKL"]
    (half / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model_index\.json' gives the part vae as \['antigravity'"):
        load_export(half)


def test_a_student_without_vae_and_text_encoders_is_refused(tmp_path: Path) -> None:
    student = text_student(tmp_path)
    student.codec = Codec()
    with pytest.raises(ValueError, match=r"needs a VAE and text encoders, .* has a Codec for them: sample it"):
        export(student, tmp_path / "out")
    assert not (tmp_path / "out").exists()

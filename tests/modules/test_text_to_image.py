"""Uni-DAD on a tiny Stable Diffusion: who is told which prompt, guidance, what is cached, kept, and drawn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from tests.tiny_sd import listen, save_tiny, subject, text_unidad
from tests.worlds import fit
from unidad_pl import UniDAD
from unidad_pl.backbones import NewUNet, StableDiffusion
from unidad_pl.backbones.latents import LatentCodec
from unidad_pl.training.networks import content_hash


@pytest.fixture(scope="module", params=["1.x", "xl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sd") / "sd", xl=request.param == "xl")


# XL's conditions have more parts: what does not look into them is tried with those.
FIRST = pytest.mark.parametrize("folder", ["1.x"], indirect=True)
XL = pytest.mark.parametrize("folder", ["xl"], indirect=True)


@FIRST
def test_every_network_is_told_its_own_prompt(folder: Path, photos: Path) -> None:
    model = text_unidad(folder, matching__negative_prompt="a cat")
    model.configure_model()
    told = listen(model, ["a prt dog", "a dog", "a cat", ""])
    fit(model, 1, subject(photos), limit_val_batches=1.0)
    assert {name: {text for call in calls for text in call} for name, calls in told.items()} == {
        "student.predict": {"a prt dog"},
        "fake_score.predict": {"a prt dog"},
        "fake_score.taps": {"a prt dog"},
        "target_teacher.predict": {"a prt dog", "a cat"},
        "source_teacher.predict": {"a dog", "a cat"},
    }


@XL
def test_guidance_and_its_negative_prompt_change_the_direction(folder: Path) -> None:
    def terms(**options: Any) -> Tensor:
        model = text_unidad(folder, **options)
        model.configure_model()
        torch.manual_seed(0)
        x = torch.randn(1, 4, 8, 8, requires_grad=True)
        cond, source = model.codec.embed(["a prt dog"]), model.codec.embed(["a dog"])
        model._log_loss = lambda *args, **kwargs: None  # type: ignore[method-assign]
        losses = model.matching_losses(x, cond, source)
        return torch.autograd.grad(torch.stack(list(losses.values())).sum(), x)[0]

    plain = terms()
    assert torch.equal(plain, terms())
    assert not torch.allclose(plain, terms(matching__guidance_scale=2.0))
    assert not torch.allclose(plain, terms(matching__negative_prompt="cat"))
    with pytest.raises(ValueError, match=r"guidance_scale must be at least 1, got 0\.5"):
        text_unidad(folder, matching__guidance_scale=0.5)


@XL
def test_training_keeps_codec_and_source_as_they_are_and_out(folder: Path, photos: Path, tmp_path: Path) -> None:
    model = text_unidad(folder, training__ema_decay=0.5)
    model.configure_model()
    before = {name: content_hash(getattr(model, name)) for name, _ in model.named_children() if name != "ema"}
    fit(model, 1, subject(photos), limit_val_batches=1.0).save_checkpoint(tmp_path / "one.ckpt")
    assert {name for name in before if content_hash(getattr(model, name)) == before[name]} == {"source_teacher"}
    keys = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in keys} == {"student", "fake_score", "target_teacher", "discriminator", "ema"}


@pytest.mark.slow
@XL
def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, photos: Path, tmp_path: Path) -> None:
    whole, first, second = (text_unidad(folder, student__update_every=1) for _ in range(3))
    fit(whole, 2, subject(photos), limit_val_batches=1.0)
    fit(first, 1, subject(photos), limit_val_batches=1.0).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, 2, subject(photos), tmp_path / "half.ckpt", limit_val_batches=1.0)
    for name in ("student", "fake_score", "target_teacher", "discriminator"):
        assert content_hash(getattr(second, name)) == content_hash(getattr(whole, name)), name


@pytest.mark.parametrize(
    ("folder", "gradient", "steps"),
    [
        ("1.x", "unroll", 1), ("1.x", "last", 2), ("1.x", "backward_simulation", 3), ("xl", "unroll", 4),
    ],
    indirect=["folder"],
)  # fmt: skip
def test_any_number_of_steps_trains_and_samples(folder: Path, photos: Path, steps: int, gradient: Any) -> None:
    model = text_unidad(folder, student__num_steps=steps, student__gradient=gradient)
    fit(model, 1, subject(photos))
    images = model.sample([0, 1], prompts=["a prt dog"] * 2)
    assert images.shape == (2, 3, 16, 16)
    assert images.abs().max() <= 1


def test_one_step_from_the_last_timestep_is_the_formula(folder: Path) -> None:
    model = text_unidad(folder, student__num_steps=1)
    model.configure_model()
    cond = model.codec.embed(["a dog"])
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))[None]
    tokens, _, added = model.student._conditions(cond, 1)
    abar = model.student.abar[999]
    with torch.no_grad():
        eps = model.student.unet(noise, 999, encoder_hidden_states=tokens, added_cond_kwargs=added).sample
        x0 = (noise - (1 - abar).sqrt() * eps) / abar.sqrt()
        want = model.codec.decode(x0).clamp(-1, 1)
    torch.testing.assert_close(model.sample([3], prompts=["a dog"]), want, atol=2e-5, rtol=1e-4)


def test_sigmas_that_even_spacing_ignores_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="sigma_min do nothing where the steps lie at even timesteps"):
        text_unidad(folder, student__sigma_max=10.0).configure_model()
    free = StableDiffusion(str(folder), spacing="log_linear")
    text_unidad(folder, source=free, student__sigma_max=10.0).configure_model()


def test_an_image_depends_on_its_seed_and_prompt_alone(folder: Path) -> None:
    model = text_unidad(folder)
    prompts = ["a prt dog", "a dog", "a cat"]
    together = model.sample([4, 5, 6], prompts=prompts)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(model.sample([4 + i], prompts=[prompt])[0], together[i], atol=1e-5, rtol=0)
    assert not torch.allclose(model.sample([4], prompts=["a cat"])[0], together[0])
    with pytest.raises(ValueError, match="need a condition with tokens"):
        model.sample([4])


def test_latents_and_pictures_are_those_of_diffusers(folder: Path) -> None:
    codec, vae = LatentCodec(folder), AutoencoderKL.from_pretrained(folder / "vae")
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        found = vae.encode(images).latent_dist
        torch.manual_seed(5)
        got = codec.encode(images)
        torch.manual_seed(5)
        want = (found.mean + found.std * torch.randn(found.mean.shape)) * vae.config.scaling_factor
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(codec.decode(got), vae.decode(got / vae.config.scaling_factor).sample)


def test_each_picture_and_prompt_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = LatentCodec(folder)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    first, told = codec.encode(images), codec.embed(["a dog", "a cat"])
    monkeypatch.setattr(codec.parts.vae, "encode", None)
    monkeypatch.setattr(codec.parts, "encode_prompt", None)
    assert not torch.equal(codec.encode(images.flip(0)), first.flip(0))  # drawn anew from the kept mean and std
    again = codec.embed(["a cat"])
    assert all(torch.equal(part, told[1:].parts[name]) for name, part in again.parts.items())


def test_loading_and_encoding_leave_the_random_state_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    LatentCodec(folder).embed(["a dog"])
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_are_embedded_as_a_pipeline_does(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "sd")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    want, empty = pipe.encode_prompt(["a prt dog"], "cpu", 1, True, [""])
    codec = LatentCodec(folder)
    torch.testing.assert_close(codec.embed(["a prt dog"]).tokens, want)
    torch.testing.assert_close(codec.embed([""]).tokens, empty)


def test_what_visits_a_device_goes_home_even_after_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = LatentCodec(folder)
    parts = {name: part for name, part in codec.parts.components.items() if isinstance(part, torch.nn.Module)}
    journeys: dict[str, list[str]] = {name: [] for name in parts}
    for name, part in parts.items():
        monkeypatch.setattr(part, "to", lambda device, name=name: journeys[name].append(str(device)))
    monkeypatch.setattr(codec.parts, "encode_prompt", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        codec.embed(["a dog"], "cuda")
    monkeypatch.setattr(codec.parts.vae, "encode", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        codec.encode(torch.zeros(1, 3, 16, 16))
    assert journeys.pop("vae") == ["cpu", "cpu"]
    assert journeys
    assert all(journey == ["cuda", "cpu"] for journey in journeys.values())


def test_the_border_is_float32_under_autocast(folder: Path) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    answers = []
    for on in (False, True):
        codec = LatentCodec(folder)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            latents = codec.encode(images)
            answers.append((latents, codec.decode(latents), *codec.embed(["a dog"]).parts.values()))
    for exact, mixed in zip(*answers, strict=True):
        assert mixed.dtype == torch.float32
        assert torch.equal(exact, mixed)


def test_a_folder_without_a_text_encoder_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "sd")
    for file in (tmp_path / "sd" / "tokenizer").glob("*.json"):
        file.unlink()
    (tmp_path / "sd" / "tokenizer" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer/vocab\.json nor tokenizer/tokenizer\.json"):
        text_unidad(tmp_path / "sd").configure_model()
    shutil.rmtree(tmp_path / "sd" / "text_encoder")
    with pytest.raises(FileNotFoundError, match=r"has no text_encoder/config\.json: the download is incomplete"):
        text_unidad(tmp_path / "sd").configure_model()


def test_v_prediction_trains_and_its_single_step_is_diffusers_ddim(photos: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "sd", prediction="v_prediction")
    model = text_unidad(folder, student__num_steps=1, student__update_every=1)
    fit(model, 1, subject(photos))
    cond = model.codec.embed(["a dog"])
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))[None]
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(1000)
    with torch.no_grad():
        v = model.student.unet(noise, 999, encoder_hidden_states=cond.tokens).sample
        want = model.codec.decode(scheduler.step(v, 999, noise).pred_original_sample).clamp(-1, 1)
    torch.testing.assert_close(model.sample([3], prompts=["a dog"]), want, atol=2e-5, rtol=1e-4)


def test_wrong_pictures_and_prompts_are_named(folder: Path) -> None:
    codec = LatentCodec(folder, 16)
    with pytest.raises(ValueError, match=r"serves images of \(3, 8, 8\)"):
        codec.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\], got 0 to 3"):
        codec.encode(torch.linspace(0, 3, 768).view(1, 3, 16, 16))
    with pytest.raises(ValueError, match="tokens, 77 can be read"):
        codec.embed(["dog " * 90])


def test_without_transformers_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unidad_pl.backbones.latents.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"unidad_pl\[sdp\]"):
        text_unidad(folder).configure_model()


def test_prompts_for_a_pixel_model_are_refused() -> None:
    model = UniDAD(NewUNet(resolution=8, channels=(8, 8), attention_levels=(), head_channels=8, patch_size=1))
    with pytest.raises(ValueError, match="no text-to-image model"):
        model.sample([0], prompts=["a dog"])

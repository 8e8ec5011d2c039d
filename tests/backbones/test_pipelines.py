"""Prompts and pictures of pipelines with a transformer: as the pipelines of diffusers themselves have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

from tests.backbones.conformance import FLOW, TINY_VAE
from tests.backbones.test_dit import TestDiT as DiT
from tests.backbones.test_flux import TestFlux as Flux
from tests.backbones.test_flux2 import TestFlux2 as Flux2
from tests.backbones.test_sd3 import TestSD3 as SD3
from tests.backbones.test_z_image import TestZImage as ZImage
from tests.metrics.toys import refused
from tests.tiny_sd import tokenizer as clip_tokenizer
from tests.worlds import save_pictures
from unidad_pl import Transformer, export_student
from unidad_pl.files import BrokenFile
from unidad_pl.training.conditions import check_prompts

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}.{% endif %}<|im_end|>"


def t5_tokenizer(folder: Path) -> Any:
    """T5's over letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [(chr(c), -2.0) for c in range(ord("a"), ord("z") + 1)]
    words = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *letters], 2))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.T5TokenizerFast(tokenizer_object=words, extra_ids=0, model_max_length=512)


def qwen_tokenizer(folder: Path) -> Any:
    """Qwen's over bytes, with a short chat template."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(sorted(ByteLevel.alphabet()))}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = dict(chat_template=CHAT, pad_token=SPECIAL[0], eos_token=SPECIAL[2], model_max_length=131072)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"additional_special_tokens": SPECIAL}))
    return transformers.Qwen2TokenizerFast.from_pretrained(folder)


def clip(tokens: Any, projected: bool = True) -> Any:
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=8 if not projected else 4, projection_dim=5, intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77, bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    return getattr(transformers, name)(config).eval()


def t5() -> Any:
    config = transformers.T5Config(vocab_size=30, d_model=12, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def qwen(name: str, width: int, layers: int) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=259, hidden_size=width, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    return getattr(transformers, name)(config).eval()


def parts(kind: str, place: Path) -> dict[str, Any]:
    """Tiny text encoders and tokenizers of a pipeline."""
    if kind.startswith("sd3"):
        words = clip_tokenizer(place)
        found = dict(tokenizer=words, tokenizer_2=words, text_encoder=clip(words), text_encoder_2=clip(words))
        none = dict.fromkeys(("tokenizer_3", "text_encoder_3"))
        return found | (none if kind != "sd3" else dict(tokenizer_3=t5_tokenizer(place), text_encoder_3=t5()))
    if kind == "flux":
        words = clip_tokenizer(place)
        found = dict(tokenizer=words, tokenizer_2=t5_tokenizer(place), text_encoder=clip(words, projected=False))
        return found | dict(text_encoder_2=t5())
    name, width, layers = ("Qwen3ForCausalLM", 4, 28) if kind == "flux2" else ("Qwen3Model", 12, 2)
    return dict(tokenizer=qwen_tokenizer(place), text_encoder=qwen(name, width, layers))


class Case(NamedTuple):
    folder: Path
    pipe: Any
    source: Transformer
    theirs: Any


KINDS: dict[str, Any] = dict(sd3=SD3, sd3_without_t5=SD3, flux=Flux, flux2=Flux2, z_image=ZImage)


def saved(kind: str, folder: Path, seed: int = 0) -> Case:
    """A whole pipeline, saved by diffusers."""
    torch.manual_seed(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    of = KINDS[kind]
    tiny: Any = TINY_VAE | dict(latent_channels=of.latent_channels)
    vae = getattr(diffusers, of.network.vae)(**tiny | of.vae)
    if hasattr(vae, "bn"):
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    sizes = dict(pooled_projection_dim=8) if kind == "flux" else {}
    net = getattr(diffusers, of.network.diffusers_class)(**of.config | sizes)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{k: v for k, v in of.scheduler.items() if k[0] != "_"})
    text = parts(kind, folder.parent / "words")
    pipe = getattr(diffusers, of.network.pipeline)(transformer=net, vae=vae.eval(), scheduler=scheduler, **text)
    pipe.save_pretrained(folder)
    pixels = of.side * 2 * of.network.vae_fold
    return Case(folder, pipe, Transformer(str(folder), resolution=pixels), of)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return saved(request.param, tmp_path_factory.mktemp(request.param) / "pipeline")


def their_embeddings(pipe: Any, prompt: str) -> tuple[Tensor, Tensor | None]:
    if isinstance(pipe, diffusers.StableDiffusion3Pipeline):
        found = pipe.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)
        return found[0], found[2]
    if isinstance(pipe, diffusers.FluxPipeline):
        return pipe.encode_prompt(prompt, prompt)[:2]
    found = pipe.encode_prompt(prompt)
    return (found[0][0][None], None) if isinstance(found[0], list) else (found[0], None)


@torch.no_grad()
def test_prompts_are_those_of_the_pipeline_and_fit_its_network(case: Case) -> None:
    codec, network = case.source.codec(), case.source.build()
    prompts = ["a dog", "a", "a dog"]
    cond = codec.embed(prompts)
    assert cond.tokens is not None
    for row, prompt in enumerate(prompts):
        tokens, pooled = their_embeddings(case.pipe, prompt)
        kept = cond.tokens[row] if cond.mask is None else cond.tokens[row][cond.mask[row]]
        torch.testing.assert_close(kept, tokens[0], atol=1e-5, rtol=1e-4)
        if pooled is not None:
            assert cond.pooled is not None
            torch.testing.assert_close(cond.pooled[row], pooled[0], atol=1e-5, rtol=1e-4)
    x, sigma = torch.randn(3, *network.image_shape), torch.tensor([0.3, 1.0, 9.0])
    assert network(x, sigma, cond).isfinite().all()
    if cond.mask is None:
        assert cond.tokens.shape[1] == network.num_tokens
    refused("tokens, .* can be read: make it shorter", codec.embed, ["a " * 600])


def test_prompts_are_checked_by_the_tokenizer_that_reads_most_of_them(case: Case) -> None:
    """T5 and Qwen3 read more than CLIP's 77 tokens."""

    class Served:
        every_prompt = ("a " * 100,)

    codec = case.source.codec()
    if getattr(case.pipe, "tokenizer_3", True) is None:
        refused("has 102 tokens, 77 can be read", check_prompts, codec, Served())
        return
    check_prompts(codec, Served())
    assert codec.embed(Served.every_prompt).tokens is not None
    Served.every_prompt = ("a dog", "a " * 600)
    refused("tokens, .* can be read: make it shorter", check_prompts, codec, Served())


@torch.no_grad()
def test_pictures_are_decoded_as_the_pipeline_does(case: Case) -> None:
    """Their formulas are written out: what each pipeline does with latents at its end."""
    codec, network, vae = case.source.codec(), case.source.build(), case.pipe.vae
    latents = torch.randn(2, *network.image_shape)
    if isinstance(case.pipe, diffusers.Flux2KleinPipeline):
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        plain = case.pipe._unpatchify_latents(latents * std.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1))
    else:
        plain = latents / vae.config.scaling_factor + vae.config.shift_factor
    side = case.source.resolution
    pictures = codec.decode(latents)
    assert pictures.shape == (2, 3, side, side)
    torch.testing.assert_close(pictures, vae.decode(plain).sample, atol=1e-5, rtol=1e-4)
    given = torch.rand(2, 3, side, side) * 2 - 1
    torch.manual_seed(3)
    encoded = codec.encode(given)
    torch.manual_seed(3)
    found = vae.encode(given).latent_dist
    drawn = found.mean + found.std * torch.randn(found.mean.shape)
    if isinstance(case.pipe, diffusers.Flux2KleinPipeline):
        want = (case.pipe._patchify_latents(drawn) - vae.bn.running_mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    else:
        want = (drawn - vae.config.shift_factor) * vae.config.scaling_factor
    assert encoded.shape == (2, *network.image_shape)
    torch.testing.assert_close(encoded, want, atol=1e-4, rtol=1e-4)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    case = saved("z_image", tmp_path / "pipeline")
    (case.folder / "tokenizer").rename(case.folder / "elsewhere")
    refused("has no tokenizer/", case.source.codec, error=FileNotFoundError)
    (case.folder / "scheduler" / "scheduler_config.json").unlink()
    refused("has no scheduler/scheduler_config.json", case.source.build, error=FileNotFoundError)
    config = case.folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace("ZImageTransformer2DModel", "PixArtTransformer2DModel"))
    (case.folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(FLOW))
    refused("it is of a PixArtTransformer2DModel; supported are DiT", case.source.build)
    config.unlink()
    refused("has no transformer/config.json", case.source.build, error=FileNotFoundError)


def test_a_part_to_do_without_is_left_out_by_the_index_alone(tmp_path: Path) -> None:
    case = saved("sd3", tmp_path / "pipeline")
    path, left_out = case.folder / "model_index.json", [None, None]
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"tokenizer_3": left_out}))
    refused("leave out text_encoder_3 and tokenizer_3, or neither", case.source.codec)
    path.write_text(json.dumps(index | {"tokenizer_3": left_out, "text_encoder_3": left_out}))
    tokens = case.source.codec().embed(["a dog"]).tokens
    assert tokens is not None
    assert tokens.shape == (1, 333, 12)
    assert not tokens[:, 77:].any()
    assert tokens[:, :77].any()
    path.write_text(json.dumps(index))
    (case.folder / "text_encoder_3").rename(case.folder / "elsewhere")
    refused("must say text_encoder_3: .null, null.", case.source.codec, error=FileNotFoundError)


@pytest.mark.parametrize("length", [None, 10**30, 500])
def test_a_tokenizer_without_a_length_is_named_when_it_is_read(length: int | None, tmp_path: Path) -> None:
    case = saved("sd3", tmp_path / "pipeline")
    for name in ("tokenizer", "tokenizer_2"):
        path = case.folder / name / "tokenizer_config.json"
        whole = json.loads(path.read_text())
        other = {key: value for key, value in whole.items() if key != "model_max_length"}
        path.write_text(json.dumps(other | ({} if length is None else {"model_max_length": length})))
        seen = "model_max_length 500" if length == 500 else "no model_max_length"
        refused(
            rf"pipeline/{name}' .*tokenizer_config.json has {seen}, its text encoder reads 77 tokens",
            lambda: case.source.codec().parts, error=BrokenFile,  # type: ignore[attr-defined]
        )  # fmt: skip
        path.write_text(json.dumps(whole))
    assert case.source.codec().parts.tokenizer_2.model_max_length == 77  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["flux2", "z_image"])
def test_a_tokenizer_without_a_chat_template_is_named_when_it_is_read(kind: str, tmp_path: Path) -> None:
    case = saved(kind, tmp_path / "pipeline")
    path = case.folder / "tokenizer" / "chat_template.jinja"
    for template, message in (
        ("hello", "its chat template leaves out what is said"), ("{% for %}", "TemplateSyntaxError"),
        (None, "it has no chat template, neither as chat_template.jinja nor in tokenizer_config.json"),
    ):  # fmt: skip
        path.unlink() if template is None else path.write_text(template)
        refused(rf"pipeline/tokenizer' .*{message}", lambda: case.source.codec().parts, error=BrokenFile)  # type: ignore[attr-defined]


def test_weights_that_no_text_encoder_has_are_said(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    case = saved("flux", tmp_path / "pipeline")
    file = case.folder / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"more.weight": torch.ones(2), "logit_scale": torch.ones(1)}, file)
    said = r"2 weights in .*/text_encoder are none of a CLIPTextModel and are not used: .*more\.weight"
    with pytest.warns(UserWarning, match=said):
        tokens = case.source.codec().embed(["a dog"]).tokens
    assert tokens is not None


def test_a_class_that_diffusers_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = saved("z_image", tmp_path / "pipeline")
    monkeypatch.setattr("unidad_pl.backbones.z_image.ZImageNetwork.pipeline", "NoSuchPipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(index.read_text().replace("ZImagePipeline", "NoSuchPipeline"))
    with pytest.raises(ImportError, match=r"diffusers 0.* has no NoSuchPipeline: pip install"):
        _ = case.source.codec().parts  # type: ignore[attr-defined]


def test_a_model_of_classes_takes_no_prompts(tmp_path: Path) -> None:
    net = diffusers.DiTTransformer2DModel(**DiT.config)
    diffusers.DiTPipeline(
        net, diffusers.AutoencoderKL(**TINY_VAE), diffusers.DDIMScheduler(), {0: "cat"}
    ).save_pretrained(tmp_path)
    source = Transformer(str(tmp_path))
    codec = source.codec()
    latents = codec.encode(torch.rand(2, 3, 16, 16))
    assert latents.shape == (2, *source.build().image_shape)
    assert codec.decode(latents).shape == (2, 3, 16, 16)
    refused("no text-to-image model", codec.embed, ["a dog"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "flux2", "z_image"])
def test_the_configs_train(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations on tiny files; the student goes on from another checkpoint than the teachers, if there is one."""
    from unidad_pl.cli.main import main
    from unidad_pl.runs.student import load_student

    monkeypatch.chdir(tmp_path)
    name = dict(sd3="sd35_medium", flux2="flux2_klein", z_image="z_image_turbo")[kind]
    config = CONFIGS / f"{name}.yaml"
    base, other = (saved(kind, tmp_path / place / "pipeline", seed) for seed, place in enumerate(("base", "other")))
    pixels = str(base.source.resolution)
    student = "--model.student.init_from.init_args"
    distilled = (f"{student}.path", str(other.folder), f"{student}.resolution", pixels, f"{student}.lora.rank", "2")
    main([
        "fit", "--config", str(config), "--config", str(CONFIGS / "trainer" / "no_metrics.yaml"),
        "--trainer.accelerator", "cpu", "--data.root", str(save_pictures(tmp_path / "dog6", 2)),
        "--data.prompts.dreambooth", "null", "--data.class_word", "dog", "--data.resolution", pixels,
        "--data.evaluation.samples_per_prompt", "1", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2",
        "--trainer.enable_progress_bar", "false", "--model.source.init_args.path", str(base.folder),
        "--model.source.init_args.resolution", pixels, "--model.source.init_args.lora.rank", "2",
        "--model.training.ema_decay", "0", "--trainer.precision", "32-true",
        *(distilled if "init_from" in config.read_text() else ()),
    ])  # fmt: skip
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    found = load_student(checkpoint).network
    begun = (other if "init_from" in config.read_text() else base).source.build()
    layer = begun.output_layer
    torch.testing.assert_close(
        found.transformer.get_submodule(layer).weight, begun.transformer.get_submodule(layer).weight, atol=0, rtol=0
    )
    out = export_student(str(checkpoint), str(tmp_path / "out"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(pipe) is type(base.pipe)
    assert f"num_inference_steps={len(load_student(checkpoint).sampler)}" in (out / "README.md").read_text()


def test_pipelines_that_edit_pictures_are_named(tmp_path: Path) -> None:
    case = saved("flux", tmp_path / "pipeline")
    assert case.source.build().distilled is bool(case.theirs.config.get("guidance_embeds"))
    index = case.folder / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "FluxKontextPipeline"))
    refused("is a FluxKontextPipeline, which is not supported: .* a FluxPipeline", case.source.build)


def test_a_distilled_klein_says_so(tmp_path: Path) -> None:
    case = saved("flux2", tmp_path / "pipeline")
    assert not case.source.build().distilled
    index = case.folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    assert case.source.build().distilled

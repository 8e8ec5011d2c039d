"""Tiny model folders of the real classes, with random weights; for Stable Diffusion a real tokenizer vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.worlds import unidad
from unidad_pl import UniDAD
from unidad_pl.backbones import LoRA, StableDiffusion
from unidad_pl.condition import Condition
from unidad_pl.data import SubjectDataModule

BETAS: Any = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
WIDTH, POOLED, LENGTH = 16, 12, 77


def save_ddpm(folder: Path, classes: int | None = None, **scheduler: Any) -> None:
    """A pipeline folder in the layout of google/ddpm-*."""
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, num_class_embeds=classes,
    ).save_pretrained(folder / "unet")  # fmt: skip
    DDPMScheduler(**scheduler).save_pretrained(folder / "scheduler")


def save_unet(
    folder: Path, xl: bool = False, prediction: str = "epsilon", channels: tuple[int, int] = (8, 16), size: int = 8
) -> Path:
    """UNet, VAE and scheduler, without text parts: enough for the denoiser."""
    torch.manual_seed(1)
    extra: Any = dict(addition_embed_type="text_time", addition_time_embed_dim=8)
    extra |= dict(projection_class_embeddings_input_dim=48 + POOLED, cross_attention_dim=WIDTH + POOLED)
    unet = UNet2DConditionModel(
        sample_size=size, block_out_channels=channels, layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **(extra if xl else dict(cross_attention_dim=WIDTH)),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(prediction_type=prediction, **BETAS).save_pretrained(folder / "scheduler")
    name = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


def text_unidad(folder: Path, lora: LoRA | None = None, **flat: Any) -> UniDAD:
    """Everything that text makes possible, for the model in ``folder``; ``flat`` as for :func:`tests.worlds.groups`."""
    settings: dict[str, Any] = dict(
        source=StableDiffusion(str(folder), lora=lora), student__num_steps=2, target_teacher__weight=0.75,
        target_teacher__adaptation__update="every", matching__noise_table="model", matching__normalizer="noisy",
        matching__guidance_scale=7.5, denoising__weighting="eps", gan__noise="shared", training__ema_decay=0.0,
    )  # fmt: skip
    return unidad(**(settings | flat))


def subject(photos: Path, **options: Any) -> SubjectDataModule:
    return SubjectDataModule(str(photos), "dog", **({"resolution": 16, "batch_size": 2} | options))


def listen(model: UniDAD, texts: list[str]) -> dict[str, list[list[str]]]:
    """What the networks of a built model will be told, call by call: ``{"student.predict": [["a dog", ""], ...]}``."""
    known = {text: model.codec.embed([text]).tokens[0] for text in texts}
    told: dict[str, list[list[str]]] = {}

    def spy(name: str, method: str) -> None:
        network: Any = getattr(model, name)
        original = getattr(network, method)

        def called(x: Tensor, sigma: Tensor, cond: Condition) -> Any:
            named = [next(text for text, row in known.items() if torch.equal(row, given)) for given in cond.tokens]
            told.setdefault(f"{name}.{method}", []).append(named)
            return original(x, sigma, cond)

        setattr(network, method, called)

    for name in ("student", "fake_score", "target_teacher", "source_teacher"):
        spy(name, "predict")
        spy(name, "taps")
    return told


def in_parts(folder: Path, index: str, part: str) -> dict[str, Tensor]:
    """The weights in ``folder``, now in two files named as ``part`` says, with an index."""
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    path.unlink()
    names, where = sorted(state), {}
    for i, own in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in own}, folder / part.format(i))
        where |= dict.fromkeys(own, part.format(i))
    (folder / index).write_text(json.dumps({"weight_map": where}))
    return state


def save_tiny(folder: Path, xl: bool = False, prediction: str = "epsilon") -> Path:
    """A whole pipeline, saved by diffusers."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    save_unet(folder, xl, prediction)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    tokens = tokenizer(folder / "vocabulary")
    shape: dict[str, Any] = dict(
        vocab_size=len(tokens), intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    first = CLIPTextModel(CLIPTextConfig(hidden_size=WIDTH, **shape)).eval()
    if xl:
        second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=POOLED, projection_dim=POOLED, **shape)).eval()
        pipe = diffusers.StableDiffusionXLPipeline(vae, first, second, tokens, tokens, unet, scheduler)
    else:
        pipe = diffusers.StableDiffusionPipeline(vae, first, tokens, unet, scheduler, None, None, None, False)
    pipe.save_pretrained(folder)
    return folder


def tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer over letters and a few merges."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = ["d o", "do g</w>", "c a", "ca t</w>"]
    words = letters + [f"{c}</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)

"""Tiny Stable Diffusion folders of the real classes, with random weights and a real tokenizer vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

BETAS: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
)
WIDTH, POOLED, LENGTH = 16, 12, 77


def save_unet(
    folder: Path, xl: bool = False, prediction: str = "epsilon", channels: tuple[int, int] = (8, 16), size: int = 8
) -> Path:
    """UNet, VAE and scheduler, without text parts: enough for the denoiser."""
    torch.manual_seed(1)
    width = WIDTH + POOLED if xl else WIDTH
    extra: dict[str, Any] = (
        dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=48 + POOLED,
        )
        if xl
        else {}
    )
    unet = UNet2DConditionModel(
        sample_size=size, block_out_channels=channels, layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width, **extra,
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
        pipe = diffusers.StableDiffusionPipeline(
            vae, first, tokens, unet, scheduler, None, None, requires_safety_checker=False
        )
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
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH})
    )
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)

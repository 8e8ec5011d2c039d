"""A text-to-image student as the diffusers pipeline its source was: plain ``StableDiffusionPipeline`` code runs it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unidad_pl.backbones.latents import ZEROS, LatentCodec
from unidad_pl.backbones.lora import adapter_weights, merged
from unidad_pl.backbones.stable_diffusion import StableDiffusion, StableDiffusionUNet
from unidad_pl.export.folder import RECORD
from unidad_pl.runs.student import TrainedStudent, refuse_non_finite


def write_text_pipeline(
    student: TrainedStudent, network: StableDiffusionUNet, folder: Path, adapters: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Write UNet, VAE, text encoders, tokenizers, an ``LCMScheduler`` with the trained timesteps, and ``unidad.json``.

    Args:
        student: what to write; adapters are merged into the UNet.
        network: its network.
        folder: where to.
        adapters: write ``pytorch_lora_weights.safetensors``, for diffusers' ``load_lora_weights``, and the scheduler
            alone.
        dtype: what the weights are stored in.

    Raises:
        ValueError: the student's steps are not those that scheduler can hold; says which spacing can. Or it has no
            adapters.
    """
    codec, sampler = student.codec, student.sampler
    if not isinstance(codec, LatentCodec) or sampler.sigmas != network.even_sigmas(len(sampler)):
        raise ValueError(
            f"diffusers' LCMScheduler holds evenly spaced timesteps only, this student was trained at the sigmas "
            f"{[round(sigma, 3) for sigma in sampler.sigmas]}: sample it with 'unidad sample', or train with the "
            f"source's spacing: even"
        )
    scheduler = network.spec.scheduler("LCMScheduler", original_inference_steps=len(sampler), clip_sample=False)
    if adapters and not network.shared_weights:
        raise ValueError("this student was trained without adapters (its source has no lora): export it whole")
    pipeline = codec.parts
    kind: Any = type(pipeline)
    if adapters:
        layers = {name: weight.to(dtype) for name, weight in adapter_weights(network.unet).items()}
        if any(not bool(weight.isfinite().all()) for weight in layers.values()):
            raise ValueError(f"the adapters have weights that {dtype} cannot hold: store them in bfloat16 or float32")
        kind.save_lora_weights(folder, unet_lora_layers=layers)
        scheduler.save_pretrained(folder / "scheduler")
    else:
        unet = merged(network.unet) if network.shared_weights else network.unet
        unet.register_to_config(sample_size=network.image_shape[-1])  # the size that pipelines draw by default
        settings = {"requires_safety_checker": False, ZEROS: pipeline.config.get(ZEROS)}
        settings = {name: value for name, value in settings.items() if name in pipeline.config}
        parts = pipeline.components | {"unet": unet, "scheduler": scheduler}
        stored = {
            name: stored_as(part, dtype, name) if isinstance(part, nn.Module) else part for name, part in parts.items()
        }
        kind(**stored | settings).save_pretrained(folder)
        for config in folder.glob("text_encoder*/config.json"):  # else transformers computes as it finds them stored,
            content = json.loads(config.read_text())  # beside a UNet that diffusers makes float32
            changed = {name: "float32" for name in ("dtype", "torch_dtype") if name in content}
            config.write_text(json.dumps(content | changed, indent=2) + "\n")
    record = {
        "adapters": adapters, "sigmas": sampler.sigmas, "sigma_min": student.sigma_min,
        "resolution": network.resolution, "weights": student.weights, "iteration": student.iteration,
        "token": student.token,
    }  # fmt: skip
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def stored_as(part: Any, dtype: torch.dtype, name: str) -> Any:
    """``part``, or a copy of it whose weights are ``dtype``.

    Raises:
        ValueError: a weight is not finite, or is not in ``dtype``; names it.
    """
    refuse_non_finite(part, f"the {name} to export")
    if all(weight.dtype == dtype for weight in part.parameters()):
        return part
    twin = nn.Module.to(copy.deepcopy(part), dtype)  # diffusers' own `to` warns
    refuse_non_finite(twin, f"the {name} in {dtype}", "store it in bfloat16 or float32")
    return twin


def check_text_export(folder: Path, record: dict[str, Any]) -> StableDiffusion:
    """The model in an export's folder.

    Raises:
        ValueError: it holds adapters alone.
    """
    if record.get("adapters"):
        raise ValueError(
            f"{str(folder)!r} holds adapters only: load them in diffusers with load_lora_weights, or export the run "
            f"whole, without --adapters"
        )
    return StableDiffusion(str(folder), record.get("resolution"))

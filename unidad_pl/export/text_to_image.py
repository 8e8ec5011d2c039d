"""A text-to-image student as the diffusers pipeline its source was: plain diffusers code runs it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from unidad_pl.backbones.base import DiffusersNetwork
from unidad_pl.backbones.latents import ZEROS, LatentCodec
from unidad_pl.backbones.lean import dtype_of
from unidad_pl.backbones.lora import adapter_weights, merged
from unidad_pl.backbones.sd_files import RECORD_FILE
from unidad_pl.backbones.sources import Transformer
from unidad_pl.backbones.spec import SOURCE_SCHEDULER_FILE, find_scheduler
from unidad_pl.backbones.stable_diffusion import StableDiffusion, StableDiffusionUNet
from unidad_pl.backbones.transformer import TransformerNetwork
from unidad_pl.denoiser import Denoiser, DenoiserSource
from unidad_pl.runs.student import TrainedStudent, refuse_non_finite

TextNetwork = StableDiffusionUNet | TransformerNetwork


def is_text_network(network: Denoiser) -> TypeGuard[TextNetwork]:
    """Whether a student of this kind becomes a pipeline of diffusers' own."""
    flow = isinstance(network, TransformerNetwork) and network.takes_prompts and network.spec.prediction == "flow"
    return flow or isinstance(network, StableDiffusionUNet)


def write_text_pipeline(
    student: TrainedStudent, network: TextNetwork, folder: Path, adapters: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Write network, VAE, text encoders, tokenizers, a scheduler that takes few steps, and ``unidad.json``.

    Args:
        student: what to write; adapters are merged into the network.
        network: its network.
        folder: where to.
        adapters: write ``pytorch_lora_weights.safetensors``, for diffusers' ``load_lora_weights``, and the scheduler
            alone.
        dtype: what the weights are stored in.

    Raises:
        ValueError: the student's steps are not those that the scheduler can hold; says which spacing can. Or it has no
            adapters, or its source no VAE and text encoders.
    """
    codec, part = latent_codec(student), network.part
    scheduler = _scheduler(student, network)
    if adapters and not network.shared_weights:
        raise ValueError("this student was trained without adapters (its source has no lora): export it whole")
    pipeline = codec.parts
    kind: Any = type(pipeline)
    if adapters:
        layers = {name: weight.to(dtype) for name, weight in adapter_weights(network.net, part).items()}
        if any(not bool(weight.isfinite().all()) for weight in layers.values()):
            raise ValueError(f"the adapters have weights that {dtype} cannot hold: store them in bfloat16 or float32")
        kind.save_lora_weights(folder, **{f"{part}_lora_layers": layers})
        scheduler.save_pretrained(folder / "scheduler")
    else:
        net = plain_network(network, dtype)
        if isinstance(network, StableDiffusionUNet):
            net.register_to_config(sample_size=network.image_shape[-1])  # the size that pipelines draw by default
        settings = {"requires_safety_checker": False, ZEROS: pipeline.config.get(ZEROS), "is_distilled": True}
        settings = {name: value for name, value in settings.items() if name in pipeline.config}
        stored = {
            name: stored_as(one, dtype, name) if isinstance(one, nn.Module) else one
            for name, one in pipeline.components.items() if name != part
        }  # fmt: skip
        kind(**stored | settings | {part: net, "scheduler": scheduler}).save_pretrained(folder)
        if isinstance(network, TransformerNetwork):
            scheduler_file = find_scheduler(codec.folder)
            assert scheduler_file is not None  # the source was built with it
            shutil.copyfile(scheduler_file, folder / "scheduler" / SOURCE_SCHEDULER_FILE)
        for config in folder.glob("text_encoder*/config.json"):  # else transformers computes as it finds them stored,
            content = json.loads(config.read_text())  # beside a network that diffusers makes float32
            changed = {name: "float32" for name in ("dtype", "torch_dtype") if name in content}
            config.write_text(json.dumps(content | changed, indent=2) + "\n")
    record = {
        "adapters": adapters, "sigmas": student.sampler.sigmas, "sigma_min": student.sigma_min,
        "resolution": network.resolution, "weights": student.weights, "iteration": student.iteration,
        "token": student.token, "guidance": getattr(network, "guidance", None),
    }  # fmt: skip
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")


def latent_codec(student: TrainedStudent) -> LatentCodec:
    """What makes latents of pictures for ``student``.

    Raises:
        ValueError: it has no VAE.
    """
    if not isinstance(student.codec, LatentCodec):
        raise ValueError(
            f"a pipeline needs a VAE and text encoders, this student's source has a {type(student.codec).__name__} for "
            f"them: sample it with 'unidad sample', or train it from a diffusers folder"
        )
    return student.codec


def _scheduler(student: TrainedStudent, network: TextNetwork) -> Any:
    """Of diffusers: one that denoises and adds fresh noise, step by step, at the student's noise levels."""
    steps = len(student.sampler)
    if isinstance(network, TransformerNetwork):  # a pipeline is given the levels; shifted ones, so no more of that
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(network.spec.train_timesteps, stochastic_sampling=True)
    if student.sampler.sigmas != network.even_sigmas(steps):
        raise ValueError(
            f"diffusers' LCMScheduler holds evenly spaced timesteps only, this student was trained at the sigmas "
            f"{[round(sigma, 3) for sigma in student.sampler.sigmas]}: sample it with 'unidad sample', or train with "
            f"the source's spacing: even"
        )
    return network.spec.scheduler("LCMScheduler", original_inference_steps=steps, clip_sample=False)


def plain_network(network: DiffusersNetwork, dtype: torch.dtype) -> Any:
    """The diffusers network of ``network``, its weights ``dtype`` and its adapters merged into them.

    Raises:
        ValueError: see :func:`stored_as`.
    """
    if not network.shared_weights:
        return stored_as(network.net, dtype, network.part)
    refuse_non_finite(network.net, f"the {network.part} to export")
    return _held(merged(network.net, dtype), network.part)


def stored_as(part: Any, dtype: torch.dtype, name: str) -> Any:
    """``part``, or a copy of it whose weights are ``dtype``.

    Raises:
        ValueError: a weight is not finite, or is not in ``dtype``; names it.
    """
    refuse_non_finite(part, f"the {name} to export")
    if all(weight.dtype == dtype for weight in part.parameters()):
        return part
    return _held(nn.Module.to(copy.deepcopy(part), dtype), name)  # diffusers' own `to` warns


def _held(part: nn.Module, name: str) -> nn.Module:
    refuse_non_finite(part, f"the {name} in {dtype_of(part)}", "store it in bfloat16 or float32")
    return part


def check_text_export(folder: Path, record: dict[str, Any]) -> DenoiserSource:
    """The model in an export's folder.

    Raises:
        ValueError: it holds adapters alone.
    """
    if record.get("adapters"):
        raise ValueError(
            f"{str(folder)!r} holds adapters only: load them in diffusers with load_lora_weights, or export the run "
            f"whole, without --adapters"
        )
    if (folder / TransformerNetwork.part).is_dir():
        return Transformer(str(folder), record.get("resolution"), guidance=record.get("guidance"))
    return StableDiffusion(str(folder), record.get("resolution"))

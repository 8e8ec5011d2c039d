"""Guided-diffusion checkpoints to ``UNet2DModel`` folders on disk, and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from unidad_pl.backbones.adm import ADMStateDictAdapter, read_adm
from unidad_pl.backbones.adm_config import ADMConfig
from unidad_pl.backbones.weights import read_weights
from unidad_pl.files import expanded, reading, replacing

FLAGS_FILE = "adm.json"


def import_adm(checkpoint: str, out: str, preset: str | None = None, config: str | None = None) -> Path:
    """Write a guided-diffusion (ADM) checkpoint as a folder that diffusers and ``PretrainedUNet`` read.

    The folder holds ``config.json`` and ``diffusion_pytorch_model.safetensors`` (``UNet2DModel.from_pretrained``),
    ``scheduler/`` (``DDPMScheduler.from_pretrained``), ``denoiser.json``, and the flags in ``adm.json``. Numbers and
    dtypes stay as they are. It appears whole or not at all.

    Args:
        checkpoint: the file, written by torch.save or as .safetensors.
        out: the folder to make.
        preset: name of a published model: ffhq256, lsun256, imagenet64, imagenet256 or imagenet256_uncond.
        config: JSON file with the flags the checkpoint was trained with. Give this or a preset.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is there and not empty.
        FileNotFoundError: checkpoint or config is missing.
        ValueError: neither or both of preset and config, flags that a ``UNet2DModel`` cannot represent, or weights
            that do not fit them (names keys and shapes).
    """
    if (preset is None) == (config is None):
        raise ValueError(f"give either a preset or a config, got preset={preset!r} and config={config!r}")
    target = expanded(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{out!r} is there already: choose another folder, or remove it")
    adm = ADMConfig.preset(preset) if preset is not None else ADMConfig.load(str(config))
    denoiser = read_adm(adm, expanded(checkpoint))
    variance = "learned_range" if adm.learn_sigma else "fixed_small"
    with replacing(target) as part:
        denoiser.save_pretrained(part, denoiser.unet.dtype)
        adm.spec.scheduler("DDPMScheduler", variance_type=variance).save_pretrained(part / "scheduler")
        (part / FLAGS_FILE).write_text(json.dumps(asdict(adm), indent=2) + "\n")
    return target


def restore_adm(folder: str, out: str) -> Path:
    """Write a folder of :func:`import_adm` back as a guided-diffusion checkpoint: the original keys, bit for bit.

    Args:
        folder: the folder; its weights may have been trained further.
        out: the file to make: ``.safetensors``, or anything else for torch.save.

    Returns:
        The file.

    Raises:
        FileExistsError: the file is there already.
        FileNotFoundError: the folder has no ``adm.json`` or no weights.
        ValueError: the weights do not fit the flags in ``adm.json``.
    """
    from safetensors.torch import save_file

    place = expanded(folder)
    target, weights = expanded(out), place / "diffusion_pytorch_model.safetensors"
    if target.exists():
        raise FileExistsError(f"{out!r} is there already: choose another name, or remove it")
    for path in (place / FLAGS_FILE, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{folder!r} was not made by 'unidad import adm': it has no {path.name}")
    adapter = ADMStateDictAdapter(ADMConfig.load(place / FLAGS_FILE))
    with reading(weights, f"weights of the network in {FLAGS_FILE}"):
        state = {name: value.contiguous() for name, value in adapter.from_diffusers(read_weights(weights)).items()}
    with replacing(target) as part:
        if target.suffix == ".safetensors":
            save_file(state, part)
        else:
            torch.save(state, part)
    return target

"""What a diffusers scheduler config says about the network it was made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unidad_pl.backbones.unet_spec import BETA_SCHEDULES, UNetSpec

SCHEDULER_FILE = "scheduler_config.json"
SUPPORTED = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "LCMScheduler",
)  # fmt: skip
"""Schedulers of variance-preserving networks with discrete timesteps: all read the same betas."""


def find_scheduler(folder: Path) -> Path | None:
    """The scheduler config that belongs to the network in ``folder``: beside it, below it, or in a pipeline folder
    beside ``unet/``; None if there is none."""
    for place in (folder, folder / "scheduler", folder.parent / "scheduler"):
        if (place / SCHEDULER_FILE).is_file():
            return place / SCHEDULER_FILE
    return None


def spec_of_scheduler(path: Path) -> UNetSpec:
    """How to read a network that was trained with the scheduler config ``path``.

    Absent entries mean diffusers' defaults: 1000 timesteps, linear betas from 1e-4 to 0.02, prediction of the noise.

    Raises:
        ValueError: not a JSON object, a scheduler, betas or prediction type that are not supported; names the value.
    """
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        name = config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no scheduler config: {error}") from error
    if name not in SUPPORTED:
        raise ValueError(f"{path}: scheduler {name} is not supported; supported are {', '.join(SUPPORTED)}")
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise ValueError(f"{path}: trained_betas and rescale_betas_zero_snr are not supported, only named schedules")
    schedule, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if schedule not in BETA_SCHEDULES:
        raise ValueError(f"{path}: beta_schedule {schedule!r} is not one of {', '.join(BETA_SCHEDULES)}")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"{path}: prediction_type {prediction!r} is not one of epsilon, v_prediction, sample")
    return UNetSpec(
        prediction=prediction,
        beta_schedule=schedule,
        beta_start=config.get("beta_start", 1e-4),
        beta_end=config.get("beta_end", 0.02),
        train_timesteps=config.get("num_train_timesteps", 1000),
    )

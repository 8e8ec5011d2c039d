"""How a network is read as a denoiser: what it predicts, and the noise levels it was trained at; from its scheduler."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from unidad_pl.checks import check_at_least, check_given, check_options, check_positive, check_whole
from unidad_pl.denoiser import PredictionType
from unidad_pl.files import read_json, reading
from unidad_pl.schedules import flow_sigmas, linear_abar

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
MOST_TIMESTEPS, MOST_PATCH, MOST_SIGMA_DATA, MOST_SHIFT = 100_000, 64, 1e6, 1000.0
SOURCE_SCHEDULER_FILE = "source_scheduler_config.json"
"""Beside the scheduler of an export that is given its noise levels: that of the model it was trained from."""
SCHEDULER_FILE = "scheduler_config.json"
SUPPORTED = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "LCMScheduler",
)  # fmt: skip
"""Schedulers of variance-preserving networks with discrete timesteps: all read the same betas."""
FLOW = "FlowMatchEulerDiscreteScheduler"
OTHER_FLOWS = {
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "invert_sigmas": False,
    "shift_terminal": None,
}  # fmt: skip
"""Options of a flow's scheduler that place the times otherwise than by a shift -> the value that does not."""
SHIFT_TYPES = ("exponential", "linear")


@dataclass(frozen=True)
class UNetSpec:
    """What a ``UNet2DModel``'s own config does not say about how to use it as a denoiser. Saved as ``denoiser.json``.

    Attributes:
        prediction: what the network predicts: ``epsilon``, ``v_prediction``, ``sample`` (variance-preserving input),
            ``edm`` (Karras et al. 2022 preconditioning) or ``flow`` (flow matching).
        sigma_data: standard deviation of the data; used by ``edm`` only.
        patch_size: pixels per side folded into channels before the network and back after it; 1 = none. The network
            then works on an image ``patch_size`` times smaller, with ``patch_size^2`` times the channels.
        timestep: how ``epsilon``/``v_prediction``/``sample`` networks see sigma: the ``nearest`` of the trained
            timesteps (parity with released code) or ``interpolated`` in log sigma. ``edm`` sees ``250 * ln(sigma)/4``,
            ``flow`` its time in timesteps.
        beta_schedule: name of the betas' schedule in diffusers (variance-preserving networks): ``linear``,
            ``scaled_linear`` or ``squaredcos_cap_v2``; the cosine schedule has no use for first and last beta.
        beta_start: first beta.
        beta_end: last beta.
        train_timesteps: length of the schedule.
        shift: of the times of a ``flow`` network, see :func:`~unidad_pl.schedules.flow_sigmas`.

    Raises:
        ValueError: an unknown name, or a number out of range; names the option.
    """

    prediction: PredictionType = "epsilon"
    sigma_data: float = 0.5
    patch_size: int = 1
    timestep: Literal["nearest", "interpolated"] = "nearest"
    beta_schedule: BetaSchedule = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    train_timesteps: int = 1000
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_options(self)
        check_given(**asdict(self))
        check_positive(sigma_data=self.sigma_data, beta_start=self.beta_start)
        check_positive(MOST_SHIFT, shift=self.shift)
        check_at_least(0, MOST_SIGMA_DATA, sigma_data=self.sigma_data)
        check_at_least(0, 0.9999, beta_start=self.beta_start, beta_end=self.beta_end)
        check_whole(1, MOST_PATCH, null=True, patch_size=self.patch_size)
        check_whole(2, MOST_TIMESTEPS, null=True, train_timesteps=self.train_timesteps)
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end must be at least beta_start, got {self.beta_end} and {self.beta_start}")

    def abar(self) -> Tensor:
        """Cumulative signal variance of the trained timesteps, [train_timesteps] float32, descending."""
        if self.beta_schedule == "linear":
            return linear_abar(self.train_timesteps, self.beta_start, self.beta_end)
        return self.scheduler("DDPMScheduler").alphas_cumprod

    def scheduler(self, name: str, **options: Any) -> Any:
        """The diffusers scheduler called ``name`` (variance-preserving networks) at these noise levels."""
        import diffusers

        return getattr(diffusers, name)(
            num_train_timesteps=self.train_timesteps, beta_start=self.beta_start, beta_end=self.beta_end,
            beta_schedule=self.beta_schedule, prediction_type=self.prediction, **options,
        )  # fmt: skip

    def own_sigmas(self, num_steps: int) -> list[float] | None:
        """Few steps of a ``flow`` network: evenly spaced times, shifted as in its training, from the last one down."""
        if self.prediction != "flow":
            return None
        return flow_sigmas(1 - torch.arange(num_steps) / num_steps, self.shift).tolist()

    def flow_levels(self) -> Tensor:
        """The sigmas of a ``flow`` network's timesteps, ascending up to 999."""
        levels = flow_sigmas(torch.arange(1, self.train_timesteps + 1) / self.train_timesteps, self.shift)
        return levels.unique()  # all beyond the last time are one


def find_scheduler(folder: Path) -> Path | None:
    """The scheduler config that belongs to the network in ``folder``: beside it, below it, or in a pipeline folder
    beside ``unet/``; None if there is none. In an export that has two, the one of its source."""
    places = (folder, folder / "scheduler", folder.parent / "scheduler")
    files = (place / name for place in places for name in (SOURCE_SCHEDULER_FILE, SCHEDULER_FILE))
    return next(filter(Path.is_file, files), None)


def spec_of_scheduler(path: Path, tokens: int | None = None) -> UNetSpec:
    """How to read a network that was trained with the scheduler config ``path``.

    Absent entries mean diffusers' defaults: 1000 timesteps, linear betas from 1e-4 to 0.02, prediction of the noise.

    Args:
        path: the config.
        tokens: of an image, where a flow's shift may depend on them; None: it must not.

    Raises:
        ValueError: not a JSON object, a scheduler, betas or prediction type that are not supported; names the value.
    """
    config = read_json(path, "scheduler config")
    name = config.get("_class_name")
    if name == FLOW:
        return _spec_of_flow(path, config, tokens)
    if name not in SUPPORTED:
        raise ValueError(f"{path}: scheduler {name} is not supported; supported are {', '.join((*SUPPORTED, FLOW))}")
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise ValueError(f"{path}: trained_betas and rescale_betas_zero_snr are not supported, only named schedules")
    schedule, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if schedule not in get_args(BetaSchedule):
        raise ValueError(f"{path}: beta_schedule {schedule!r} is not one of {', '.join(get_args(BetaSchedule))}")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"{path}: prediction_type {prediction!r} is not one of epsilon, v_prediction, sample")
    with reading(path, "scheduler config"):
        return UNetSpec(
            prediction, beta_schedule=schedule, beta_start=config.get("beta_start", 1e-4),
            beta_end=config.get("beta_end", 0.02), train_timesteps=config.get("num_train_timesteps", 1000),
        )  # fmt: skip


def _spec_of_flow(path: Path, config: dict[str, Any], tokens: int | None) -> UNetSpec:
    dynamic = bool(config.get("use_dynamic_shifting"))
    others = {name: config[name] for name, plain in OTHER_FLOWS.items() if config.get(name, plain) != plain}
    if dynamic and tokens is None:
        others["use_dynamic_shifting"] = True
    if others:
        raise ValueError(f"{path}: times of a flow are placed by their shift alone here, this has {others}")
    with reading(path, "scheduler config"):
        shift = shift_of_size(config, tokens or 0) if dynamic else config.get("shift", 1.0)
        return UNetSpec("flow", shift=shift, train_timesteps=config.get("num_train_timesteps", 1000))


def shift_of_size(config: dict[str, Any], tokens: int) -> float:
    """The shift of a scheduler config with dynamic shifting for images of ``tokens``: its ``mu`` is linear in them.

    Raises:
        ValueError: entries that are no numbers, or another kind of shift.
    """
    usual = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    given = {name: config.get(name) or default for name, default in usual.items()}
    check_positive(**given)
    few, many, low, high = given.values()
    if few == many:
        raise ValueError(f"base_image_seq_len and max_image_seq_len must differ, both are {few}")
    return shift_of_mu(config.get("time_shift_type", "exponential"), low + (high - low) * (tokens - few) / (many - few))


def shift_of_mu(kind: str, mu: float) -> float:
    """The shift that a scheduler with dynamic shifting and ``time_shift_type`` ``kind`` makes of ``mu``."""
    if kind not in SHIFT_TYPES:
        raise ValueError(f"time_shift_type must be one of {', '.join(SHIFT_TYPES)}, got {kind!r}")
    check_at_least(-50, 50, mu=mu)
    return math.exp(mu) if kind == "exponential" else mu

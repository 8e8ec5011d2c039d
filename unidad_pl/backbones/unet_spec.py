"""How a ``UNet2DModel`` is read as a denoiser: what it predicts, and the noise levels it was trained at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from unidad_pl.denoiser import PREDICTION_TYPES, PredictionType
from unidad_pl.schedules import linear_abar

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
BETA_SCHEDULES: tuple[str, ...] = get_args(BetaSchedule)


@dataclass(frozen=True)
class UNetSpec:
    """What a ``UNet2DModel``'s own config does not say about how to use it as a denoiser. Saved as ``denoiser.json``.

    Attributes:
        prediction: what the network predicts: ``epsilon``, ``v_prediction``, ``sample`` (variance-preserving input)
            or ``edm`` (Karras et al. 2022 preconditioning).
        sigma_data: standard deviation of the data; used by ``edm`` only.
        patch_size: pixels per side folded into channels before the network and back after it; 1 = none. The network
            then works on an image ``patch_size`` times smaller, with ``patch_size^2`` times the channels.
        timestep: how ``epsilon``/``v_prediction``/``sample`` networks see sigma: the ``nearest`` of the trained
            timesteps (parity with released code) or ``interpolated`` in log sigma. ``edm`` sees ``250 * ln(sigma)/4``.
        beta_schedule: name of the betas' schedule in diffusers (variance-preserving networks): ``linear``,
            ``scaled_linear`` or ``squaredcos_cap_v2``; the cosine schedule has no use for first and last beta.
        beta_start: first beta.
        beta_end: last beta.
        train_timesteps: length of the schedule.
    """

    prediction: PredictionType = "epsilon"
    sigma_data: float = 0.5
    patch_size: int = 1
    timestep: Literal["nearest", "interpolated"] = "nearest"
    beta_schedule: BetaSchedule = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTION_TYPES:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTION_TYPES)}, got {self.prediction!r}")
        if self.timestep not in ("nearest", "interpolated"):
            raise ValueError(f"timestep must be 'nearest' or 'interpolated', got {self.timestep!r}")
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}, got {self.beta_schedule!r}")
        if self.sigma_data <= 0 or self.patch_size < 1:
            raise ValueError(f"sigma_data must be > 0 and patch_size >= 1, got {self.sigma_data} and {self.patch_size}")

    def abar(self) -> Tensor:
        """Cumulative signal variance of the trained timesteps, [train_timesteps] float32, descending."""
        if self.beta_schedule == "linear":
            return linear_abar(self.train_timesteps, self.beta_start, self.beta_end)
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(self.train_timesteps, self.beta_start, self.beta_end, self.beta_schedule)
        abar: Tensor = scheduler.alphas_cumprod
        return abar

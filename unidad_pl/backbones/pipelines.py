"""The codec of a diffusers pipeline with a transformer: its VAE's latents, and prompts by its own ``encode_prompt``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unidad_pl.backbones.folders import in_diffusers
from unidad_pl.backbones.latents import LatentCodec, read_vae
from unidad_pl.backbones.transformer import TransformerNetwork
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Codec
from unidad_pl.files import reading


class PipelineCodec(LatentCodec):
    """Pictures <-> latents, prompts -> conditions, as :class:`~unidad_pl.backbones.latents.LatentCodec` has them.

    Args:
        folder: the pipeline's folder.
        network: what its transformer is used through.
        resolution: side of the pictures in pixels; None: what the model was made for.
    """

    def __init__(self, folder: Path, network: type[TransformerNetwork], resolution: int | None = None) -> None:
        self.network = network
        super().__init__(folder, resolution)

    def _check_files(self, folder: Path) -> None:
        pass

    def _read(self) -> Any:
        kind = self.network
        parts: dict[str, Any] = {"transformer": None, "scheduler": None, "vae": read_vae(self.folder / "vae", kind.vae)}
        with reading(self.folder, "pipeline"):
            return in_diffusers(kind.pipeline)(**parts)

    def embed(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Condition:
        if not self.network.takes_prompts:
            return Codec.embed(self, prompts, device)
        return super().embed(prompts, device)

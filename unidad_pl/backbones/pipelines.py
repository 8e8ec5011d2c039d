"""The codec of a diffusers pipeline with a transformer: its VAE's latents, and prompts by its own ``encode_prompt``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unidad_pl.backbones.folders import in_diffusers
from unidad_pl.backbones.latents import LatentCodec, check_length, need_transformers, read_vae
from unidad_pl.backbones.sd_files import read_text_encoder, read_tokenizer
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
        fetch: gets the weights of VAE and text encoders into the folder, which it returns; None: they are there.
    """

    def __init__(
        self, folder: Path, network: type[TransformerNetwork], resolution: int | None = None,
        fetch: Callable[[], Path] | None = None,
    ) -> None:  # fmt: skip
        self.network = network
        super().__init__(folder, resolution, fetch)

    def _check_files(self, folder: Path) -> None:
        if not self.network.takes_prompts:
            return
        need_transformers()
        for name in self.network.text_parts:
            if not (folder / name).is_dir():
                raise FileNotFoundError(f"source model {str(folder)!r} has no {name}/: the download is incomplete")

    def _read(self) -> Any:
        kind = self.network
        parts: dict[str, Any] = {"transformer": None, "scheduler": None, "vae": read_vae(self.folder / "vae", kind.vae)}
        for name, of in kind.text_parts.items():
            read = read_text_encoder if name.startswith("text_encoder") else read_tokenizer
            parts[name] = read(self.folder / name, of)
        with reading(self.folder, "pipeline"):
            for name in kind.text_parts:
                tokenizer, encoder = parts[name], parts[name.replace("tokenizer", "text_encoder")]
                last = -1 if tokenizer is encoder else max(tokenizer.get_vocab().values())
                if last >= encoder.config.vocab_size:
                    raise ValueError(f"{name} has tokens up to {last}, its text encoder {encoder.config.vocab_size}")
            return in_diffusers(kind.pipeline)(**parts)

    def _normalised(self, latents: Tensor) -> Tensor:
        if (norm := self._norm(latents)) is None:
            return super()._normalised(latents)
        return (F.pixel_unshuffle(latents, self.network.vae_fold) - norm[0]) / norm[1]

    def _denormalised(self, latents: Tensor) -> Tensor:
        if (norm := self._norm(latents)) is None:
            return super()._denormalised(latents)
        return F.pixel_shuffle(latents * norm[1] + norm[0], self.network.vae_fold)

    def _norm(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation [C, 1, 1] of the folded latents, where the VAE keeps them."""
        norm = getattr(self.parts.vae, "bn", None)
        if norm is None:
            return None
        mean, variance = (one.to(like)[:, None, None] for one in (norm.running_mean, norm.running_var))
        return mean, (variance + self.parts.vae.config.batch_norm_eps).sqrt()

    def embed(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Condition:
        """Conditions of what the network takes, float32.

        Raises:
            ValueError: a prompt with more tokens than the text encoder reads, or a model of classes.
        """
        if not self.network.takes_prompts:
            return Codec.embed(self, prompts, device)
        return super().embed(prompts, device)

    def reader(self) -> tuple[Any, int] | None:
        network = self.network
        return (getattr(self.parts, network.tokenizer), network.most_tokens) if network.takes_prompts else None

    def _embedding_of(self, prompt: str, device: torch.device | str) -> Condition:
        reader = self.reader()
        assert reader is not None
        check_length(reader, prompt)
        found = self.network.encoded(self.parts, prompt, device)
        return Condition(**{name: part.float().cpu() for name, part in found.parts.items()})

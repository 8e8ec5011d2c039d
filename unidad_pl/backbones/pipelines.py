"""The codec of a diffusers pipeline with a transformer: its VAE's latents, and prompts by its own ``encode_prompt``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unidad_pl.backbones.folders import CONFIG_FILE, in_diffusers
from unidad_pl.backbones.latents import LatentCodec, check_length, check_vocabulary, need_transformers, read_vae
from unidad_pl.backbones.sd_files import INDEX_FILE, index_if_any, read_text_encoder, read_tokenizer
from unidad_pl.backbones.transformer import TransformerNetwork
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Codec
from unidad_pl.files import BrokenFile, read_json, reading


def text_parts(folder: Path, network: type[TransformerNetwork]) -> Mapping[str, str]:
    """The text encoders and tokenizers of the pipeline in ``folder`` -> their classes in transformers.

    Raises:
        BrokenFile: its index leaves out a text encoder but not its tokenizer, or the other way round.
    """
    index = index_if_any(folder)
    absent = [name for name in network.dispensable if index.get(name) == [None, None]]
    if absent and len(absent) < len(network.dispensable):
        both = " and ".join(network.dispensable)
        raise BrokenFile(f"{str(folder / INDEX_FILE)!r} has no {absent[0]}: leave out {both}, or neither")
    return {name: of for name, of in network.text_parts.items() if name not in absent}


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
        for name in text_parts(folder, self.network):
            if not (folder / name).is_dir():
                hint = f"; to do without it, {INDEX_FILE} must say {name}: [null, null]"
                raise FileNotFoundError(
                    f"source model {str(folder)!r} has no {name}/: the download is incomplete"
                    f"{hint if name in self.network.dispensable else ''}"
                )

    def _read(self) -> Any:
        kind, present = self.network, text_parts(self.folder, self.network)
        parts: dict[str, Any] = dict.fromkeys(("transformer", "scheduler", *kind.text_parts))
        parts["vae"] = read_vae(self.folder / "vae", kind.vae)
        for name, of in present.items():
            place = self.folder / name
            encoder = name.startswith("text_encoder")
            parts[name] = read_text_encoder(place, of) if encoder else read_tokenizer(place, of, kind.chats)
        check_vocabulary(self.folder, parts)
        with reading(self.folder, "pipeline"):
            pipe = in_diffusers(kind.pipeline)(**parts)
        config = read_json(self.folder / kind.part / CONFIG_FILE, "config of a transformer")
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(**config))  # prompts are as wide as it wants them
        return pipe

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
        if not network.takes_prompts:
            return None
        if (reader := getattr(self.parts, network.tokenizer)) is not None:
            return reader, network.most_tokens
        return self.parts.tokenizer, self.parts.tokenizer.model_max_length

    def _embedding_of(self, prompt: str, device: torch.device | str) -> Condition:
        reader = self.reader()
        assert reader is not None
        check_length(reader, prompt)
        found = self.network.encoded(self.parts, prompt, device)
        return Condition(**{name: part.float().cpu() for name, part in found.parts.items()})

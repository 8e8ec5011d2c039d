"""The codec of Stable Diffusion: VAE latents and prompt embeddings, each computed once and kept.

The VAE and the text encoders stay on the CPU and in float32, visit the networks' device for the moment they are needed,
and belong to no LightningModule: no checkpoint holds them.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unidad_pl.backbones.folders import CONFIG_FILE, MOST, empty_network, in_diffusers
from unidad_pl.backbones.sd_files import (
    CLASSES,
    INDEX_FILE,
    PIPELINES,
    read_index,
    read_scheduler,
    read_text_encoder,
    read_tokenizer,
    text_parts,
)
from unidad_pl.backbones.weights import fill, read_folder
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Codec
from unidad_pl.files import BrokenFile, reading

ZEROS = "force_zeros_for_empty_prompt"
"""A setting of SDXL pipelines that is none of their parts."""


def read_vae(folder: Path, name: str = "AutoencoderKL") -> Any:
    """The VAE of diffusers' class ``name`` in ``folder``, float32.

    Raises:
        FileNotFoundError: its config or its weights are missing.
        BrokenFile: they cannot be read, do not fit each other, or are for other pictures than RGB.
    """
    vae = empty_network(in_diffusers(name), folder)
    with reading(folder / CONFIG_FILE, f"config of an {name}"):
        config = vae.config
        unknown = {*config["down_block_types"], *config["up_block_types"]} - {"DownEncoderBlock2D", "UpDecoderBlock2D"}
        if unknown or (config["in_channels"], config["out_channels"]) != (3, 3):
            raise ValueError(f"it must map RGB to RGB by DownEncoderBlock2D and UpDecoderBlock2D, unknown: {unknown}")
    fill(vae, read_folder(folder), str(folder))
    return vae


def need_transformers() -> None:
    """
    Raises:
        ModuleNotFoundError: transformers is not installed; names the extra.
    """
    if find_spec("transformers") is None:
        raise ModuleNotFoundError("text encoders need transformers: pip install 'unidad_pl[sdp]'")


def check_vocabulary(folder: Path, parts: dict[str, Any]) -> None:
    """Refuse a tokenizer whose tokens its text encoder in the pipeline's ``folder`` does not have, or, of CLIP's, of
    which it reads fewer; pipelines tell the others how many to make.

    Raises:
        BrokenFile: names the tokenizer's folder.
    """
    for name in (name for name, part in parts.items() if name.startswith("tokenizer") and part is not None):
        tokenizer, encoder = parts[name], parts.get(name.replace("tokenizer", "text_encoder"))
        if encoder is None:
            continue
        with reading(folder / name, "tokenizer of its text encoder"):
            last, config, length = max(tokenizer.get_vocab().values()), encoder.config, tokenizer.model_max_length
            if last >= config.vocab_size:
                raise ValueError(f"it has tokens up to {last}, its text encoder {config.vocab_size}")
            if config.model_type.startswith("clip") and length > config.max_position_embeddings:
                seen = f"model_max_length {length}" if length <= MOST else "no model_max_length"
                most = config.max_position_embeddings
                raise ValueError(f"its tokenizer_config.json has {seen}, its text encoder reads {most} tokens")


def check_length(reader: tuple[Any, int], prompt: str) -> None:
    """
    Raises:
        ValueError: the prompt has more tokens than ``reader``, see :meth:`Codec.reader`, takes in.
    """
    tokenizer, most = reader
    if (length := len(tokenizer(prompt).input_ids)) > most:
        raise ValueError(f"the prompt {prompt!r} has {length} tokens, {most} can be read: make it shorter")


class LatentCodec(Codec):
    """Pictures <-> latents by the VAE, prompts -> conditions by the text encoders, of one Stable Diffusion folder.

    Every picture and every prompt is encoded on its own, so that nothing depends on the batch it came in. Loading and
    encoding leave torch's random state alone; latents are drawn from it, ``(mean + std * eps) * scaling_factor``.

    Args:
        folder: the pipeline's folder.
        resolution: side of the pictures in pixels; None: what the model was made for.
        fetch: gives the folder once its weights are there, before they are read; None: they are.

    Raises:
        ModuleNotFoundError: transformers is not installed; names the extra.
        FileNotFoundError: a text encoder or tokenizer is missing; names it.
        ValueError: the index cannot be read, or names parts of other classes.
    """

    def __init__(self, folder: Path, resolution: int | None = None, fetch: Callable[[], Path] | None = None) -> None:
        self._check_files(folder)
        self.folder, self.resolution, self._fetch = folder, resolution, fetch
        self._parts: Any = None
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._embeddings: dict[str, Condition] = {}

    def _check_files(self, folder: Path) -> None:
        """Refuse early what cannot be read later."""
        need_transformers()
        text_parts(folder)

    @property
    def parts(self) -> Any:
        """The diffusers pipeline without its UNet, loaded when first asked for.

        Raises:
            FileNotFoundError: a file is missing.
            BrokenFile: a file is not what it should be, or weights do not fit or are not finite.
        """
        if self._parts is None:
            if self._fetch is not None:
                self.folder = self._fetch()
            with torch.random.fork_rng(devices=[]):
                self._parts = self._read()
            for part in self._parts.components.values():
                if isinstance(part, nn.Module):
                    part.requires_grad_(False).eval()
            self._parts.set_progress_bar_config(disable=True)
        return self._parts

    def _read(self) -> Any:
        import diffusers

        kinds = diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline
        index = read_index(self.folder)
        kind: Any = kinds[PIPELINES.index(index["_class_name"])]
        takes = inspect.signature(kind).parameters
        parts: dict[str, Any] = {name: None for name, given in takes.items() if given.default is given.empty}
        parts |= {"vae": read_vae(self.folder / "vae"), "scheduler": read_scheduler(self.folder / "scheduler")}
        for name in text_parts(self.folder):
            part = self.folder / name
            encoder = name.startswith("text_encoder")
            parts[name] = read_text_encoder(part, CLASSES[name][0]) if encoder else read_tokenizer(part)
        settings = {"requires_safety_checker": False, ZEROS: index.get(ZEROS) is not False}
        options = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")) | settings
        check_vocabulary(self.folder, parts)
        with reading(self.folder, "pipeline"):
            return kind(**parts | {name: value for name, value in options.items() if name in takes})

    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, R, R] in [-1, 1] -> latents [B, C, R/8, R/8] float32.

        Raises:
            ValueError: another size or range.
        """
        side = self.resolution or images.shape[-1]
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"the data module serves images of {tuple(images.shape[1:])}, but the model works on "
                f"{(3, side, side)}: set the data module's resolution to the model's"
            )
        if not bool(images.abs().max() <= 1.001):
            raise ValueError(f"pictures must be in [-1, 1], got {float(images.min()):.4g} to {float(images.max()):.4g}")
        moments = [self._moments_of(image) for image in images]
        mean, std = (torch.stack(part).to(images.device) for part in zip(*moments, strict=True))
        return self._normalised(mean + std * torch.randn_like(mean))

    def _normalised(self, latents: Tensor) -> Tensor:
        """The VAE's latents [B, C, H, W] -> the networks'."""
        config = self.parts.vae.config
        return (latents - (config.get("shift_factor") or 0)) * config.scaling_factor

    def _denormalised(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`_normalised`."""
        config = self.parts.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0)

    def _moments_of(self, image: Tensor) -> tuple[Tensor, Tensor]:
        key = hashlib.sha256(image.float().cpu().contiguous().numpy().tobytes()).hexdigest()
        if key not in self._moments:
            with self._visiting([self.parts.vae], image.device):
                found = self.parts.vae.encode(image[None].float()).latent_dist
            self._moments[key] = (found.mean[0].cpu(), found.std[0].cpu())
        return self._moments[key]

    def decode(self, images: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> pictures [B, 3, R, R] float32."""
        vae = self.parts.vae
        with self._visiting([vae], images.device):
            return torch.cat([vae.decode(self._denormalised(one[None].float())).sample for one in images])

    def embed(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Condition:
        """Conditions with tokens [B, L, D], and SDXL's pooled embeddings [B, E], float32.

        Raises:
            ValueError: a prompt with more tokens than the text encoder reads.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if missing:
            encoders = [p for n, p in self.parts.components.items() if n.startswith("text_encoder") and p is not None]
            with self._visiting(encoders, torch.device(device)), torch.random.fork_rng(devices=[]):
                self._embeddings |= {prompt: self._embedding_of(prompt, device) for prompt in missing}
        return Condition.cat([self._embeddings[prompt] for prompt in prompts]).to(device)

    def reader(self) -> tuple[Any, int] | None:
        tokenizer = self.parts.tokenizer
        return None if tokenizer is None else (tokenizer, tokenizer.model_max_length)

    def _embedding_of(self, prompt: str, device: torch.device | str) -> Condition:
        if (reader := self.reader()) is None or self.parts.text_encoder is None:
            raise BrokenFile(f"{str(self.folder / INDEX_FILE)!r} names no text encoder or no tokenizer: get all of it")
        check_length(reader, prompt)
        found = self.parts.encode_prompt(
            prompt=[prompt], device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        tokens, pooled = found[0].float().cpu(), found[2].float().cpu() if len(found) > 2 else None
        if not prompt and self.parts.config.get(ZEROS):
            tokens, pooled = torch.zeros_like(tokens), None if pooled is None else torch.zeros_like(pooled)
        return Condition(tokens=tokens, pooled=pooled)

    @contextmanager
    def _visiting(self, parts: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
        """``parts`` on ``device``, in float32 and without gradients inside; on the CPU again afterwards."""
        for part in parts:
            part.to(device)
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                yield
        finally:
            for part in parts:
                part.to("cpu")

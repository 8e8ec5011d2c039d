"""The codec of Stable Diffusion: VAE latents and prompt embeddings, each computed once and kept.

The VAE and the text encoders stay on the CPU and in float32, visit the networks' device for the moment they are needed,
and belong to no LightningModule: no checkpoint holds them.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidad_pl.backbones.plausible import check_plausible
from unidad_pl.backbones.sd_files import check_text_parts, weights_of
from unidad_pl.denoiser import Codec
from unidad_pl.files import BrokenFile


def pack_prompts(embeddings: Tensor, pooled: Tensor | None = None) -> Tensor:
    """One condition tensor from token embeddings [B, L, D] and SDXL's pooled embedding [B, E].

    Returns:
        [B, L + ceil(E / D), D]; the pooled embedding fills the last rows, zeros after it.
    """
    if pooled is None:
        return embeddings
    width = embeddings.shape[-1]
    rows = F.pad(pooled, (0, -pooled.shape[-1] % width)).view(len(pooled), -1, width)
    return torch.cat([embeddings, rows.to(embeddings)], dim=1)


class LatentCodec(Codec):
    """Pictures <-> latents by the VAE, prompts -> conditions by the text encoders, of one Stable Diffusion folder.

    Every picture and every prompt is encoded on its own, so that nothing depends on the batch it came in. Loading and
    encoding leave torch's random state alone; latents are drawn from it, ``(mean + std * eps) * scaling_factor``.

    Args:
        folder: the pipeline's folder.
        resolution: side of the pictures in pixels; None: what the model was made for.

    Raises:
        ModuleNotFoundError: transformers is not installed; names the extra.
        FileNotFoundError: a text encoder or tokenizer is missing; names it.
    """

    def __init__(self, folder: Path, resolution: int | None = None) -> None:
        if find_spec("transformers") is None:
            raise ModuleNotFoundError(
                "Stable Diffusion's text encoders need transformers: pip install 'unidad_pl[sdp]'"
            )
        check_text_parts(folder)
        self.folder, self.resolution = folder, resolution
        self._parts: Any = None
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._embeddings: dict[str, Tensor] = {}

    @property
    def parts(self) -> Any:
        """The diffusers pipeline without its UNet, loaded when first asked for."""
        if self._parts is None:
            import diffusers

            config = diffusers.DiffusionPipeline.load_config(self.folder)
            kind = getattr(diffusers, config["_class_name"])
            wanted = ("unet", "safety_checker", "feature_extractor", "image_encoder")
            self._check_plausible(config)
            absent: dict[str, Any] = {name: None for name in wanted if name in inspect.signature(kind).parameters}
            if "requires_safety_checker" in inspect.signature(kind).parameters:
                absent["requires_safety_checker"] = False
            with torch.random.fork_rng(devices=[]), weights_of(self.folder):
                options = dict(torch_dtype=torch.float32, local_files_only=True, **absent)
                parts = kind.from_pretrained(self.folder, **options)
            for part in parts.components.values():
                if isinstance(part, nn.Module):
                    part.requires_grad_(False).eval()
            parts.set_progress_bar_config(disable=True)
            self._check_tokenizers(parts)
            self._parts = parts
        return self._parts

    def _check_plausible(self, index: dict[str, Any]) -> None:
        import diffusers
        import transformers

        for name, (library, kind) in {n: v for n, v in index.items() if n.startswith(("vae", "text_encoder"))}.items():
            if kind is not None:
                with weights_of(self.folder / name):
                    check_plausible(
                        getattr({"diffusers": diffusers}.get(library, transformers), kind), self.folder / name
                    )

    def _check_tokenizers(self, parts: Any) -> None:
        """Prompts are filled up to what the tokenizer says, which the text encoder must be able to read."""
        for name, tokenizer in parts.components.items():
            encoder = getattr(parts, name.replace("tokenizer", "text_encoder"), None)
            if name.startswith("tokenizer") and encoder is not None:
                most, read = tokenizer.model_max_length, encoder.config.max_position_embeddings
                if not 1 <= most <= read:
                    raise BrokenFile(
                        f"{name} in {str(self.folder)!r} cuts prompts at {most} tokens, its text encoder reads {read}: "
                        f"download the model again"
                    )

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
        return (mean + std * torch.randn_like(mean)) * self.parts.vae.config.scaling_factor

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
            return torch.cat([vae.decode(one[None].float() / vae.config.scaling_factor).sample for one in images])

    def embed(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Conditions [B, L + P, D] float32, see :func:`pack_prompts`.

        Raises:
            ValueError: a prompt with more tokens than the text encoder reads.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if missing:
            encoders = [p for n, p in self.parts.components.items() if n.startswith("text_encoder") and p is not None]
            with self._visiting(encoders, torch.device(device)), torch.random.fork_rng(devices=[]):
                self._embeddings |= {prompt: self._embedding_of(prompt, device) for prompt in missing}
        return torch.stack([self._embeddings[prompt] for prompt in prompts]).to(device)

    def _embedding_of(self, prompt: str, device: torch.device | str) -> Tensor:
        tokenizer = self.parts.tokenizer
        tokens, most = len(tokenizer(prompt).input_ids), tokenizer.model_max_length
        if tokens > most:
            raise ValueError(f"the prompt {prompt!r} has {tokens} tokens, {most} can be read: make it shorter")
        found = self.parts.encode_prompt(
            prompt=[prompt], device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        pooled = found[2] if len(found) > 2 else None
        packed = pack_prompts(found[0].float(), None if pooled is None else pooled.float())[0].cpu()
        empty = not prompt and self.parts.config.get("force_zeros_for_empty_prompt")
        return torch.zeros_like(packed) if empty else packed

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

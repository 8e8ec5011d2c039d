"""The UNet of Stable Diffusion 1.x, 2.x and XL as a :class:`~unidad_pl.denoiser.Denoiser` of VAE latents.

Its condition has tokens [B, L, D], for XL a pooled embedding [B, E] too, and a mask where prompts differ in length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from unidad_pl.backbones.base import blank_text, checked_text
from unidad_pl.backbones.folders import CONFIG_FILE, MOST_SIDE, checked_config, checked_network
from unidad_pl.backbones.hub import find_file
from unidad_pl.backbones.latents import LatentCodec
from unidad_pl.backbones.lora import LoRA, add_adapters, base_names
from unidad_pl.backbones.sd_files import CODEC, find_pipeline
from unidad_pl.backbones.spec import UNetSpec, find_scheduler, spec_of_scheduler
from unidad_pl.backbones.unets import DiffusersUNet
from unidad_pl.backbones.weights import fill, read_folder, read_weights
from unidad_pl.checks import check_choices, check_given, check_path, check_whole
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Codec, DenoiserSource
from unidad_pl.files import reading

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Spacing = Literal["even", "log_linear"]
TOKENS = 77
"""What CLIP's text encoders read of a prompt, padding included."""
MASKED = -10000.0
"""What diffusers adds to the attention scores of tokens that are not the prompt's."""
TIME_IDS = 6
"""SDXL's size conditions: original height and width, crop top and left, target height and width."""


class StableDiffusionUNet(DiffusersUNet):
    """A diffusers ``UNet2DConditionModel`` behind the sigma contract.

    Taps are the outputs of the down blocks (``in0``, ``in1``, ...) and of the middle block (``mid``).

    Args:
        unet: the network.
        spec: how to read it; only variance-preserving networks with discrete timesteps exist.
        resolution: side of the images in pixels, an input of SDXL; None: the side its config was made for.
        vae_scale: pixels per latent, along each axis.
        spacing: see :class:`StableDiffusion`.

    Raises:
        ValueError: a network that needs other conditions than text, or a resolution that its levels do not divide.
    """

    blocks = frozenset(
        {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UNetMidBlock2DCrossAttn"}
    )

    def __init__(
        self,
        unet: UNet2DConditionModel,
        spec: UNetSpec,
        resolution: int | None = None,
        vae_scale: int = 8,
        spacing: Spacing = "even",
    ) -> None:
        check_choices(spacing=(spacing, Spacing))
        check_given(vae_scale=vae_scale)
        check_whole(1, MOST_SIDE, null=True, resolution=resolution, vae_scale=vae_scale)
        self.spacing: Spacing = spacing
        self.free_steps = spacing != "even"
        config = unet.config
        added, labels = config["addition_embed_type"], config["class_embed_type"]
        if added not in (None, "text_time") or labels is not None or config["num_class_embeds"] is not None:
            raise ValueError(
                f"this UNet wants conditions that are not text (addition_embed_type {added!r}, class_embed_type "
                f"{labels!r}): use a Stable Diffusion 1.x, 2.x or XL model"
            )
        if not isinstance(config["cross_attention_dim"], int) or config["encoder_hid_dim_type"] is not None:
            raise ValueError(
                f"this UNet takes other texts than CLIP's: cross_attention_dim {config['cross_attention_dim']}"
            )
        if config["time_embedding_type"] != "positional":
            raise ValueError(f"this UNet has time_embedding_type {config['time_embedding_type']!r}, not 'positional'")
        if config["time_cond_proj_dim"] is not None:
            raise ValueError(
                f"this UNet wants the guidance scale as an input (time_cond_proj_dim {config['time_cond_proj_dim']}), "
                f"as latent consistency models do: use a model without, or its LoRA merged into one"
            )
        if config["in_channels"] != config["out_channels"]:
            raise ValueError(
                f"this UNet maps {config['in_channels']} to {config['out_channels']} channels, as inpainting and "
                f"upscaling models do: use a text-to-image model"
            )
        super().__init__(unet, spec)
        size = config["sample_size"] if resolution is None else resolution / vae_scale
        depth = 2 ** (len(config["block_out_channels"]) - 1)
        if size is None or size < 1 or size % depth:
            factor = vae_scale * depth
            raise ValueError(f"resolution must be a multiple of {factor} pixels for this model, got {resolution}")
        self.image_shape = (config["in_channels"], int(size), int(size))
        self.resolution = int(size) * vae_scale
        self.width: int = config["cross_attention_dim"]
        sizes = TIME_IDS * (config["addition_time_embed_dim"] or 0)
        self.pooled = config["projection_class_embeddings_input_dim"] - sizes if added else 0

    def _output(self, scaled: Tensor, time: Tensor, cond: Condition | None) -> Tensor:
        tokens, mask, added = self._conditions(cond, len(scaled))
        return self.unet(
            scaled.to(self.dtype), time, encoder_hidden_states=tokens, encoder_attention_mask=mask,
            added_cond_kwargs=added,
        ).sample  # fmt: skip

    def _conditioned(self, emb: Tensor, cond: Condition | None) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, mask, added = self._conditions(cond, len(emb))
        extra = self.unet.get_aug_embed(emb=emb, encoder_hidden_states=tokens, added_cond_kwargs=added)
        crossed = {"encoder_hidden_states": tokens}
        if mask is not None:  # blocks take what is added to the attention's scores, the whole network the mask itself
            crossed["encoder_attention_mask"] = (1 - mask.to(tokens.dtype))[:, None] * MASKED
        return emb if extra is None else emb + extra, crossed

    @property
    def tap_channels(self) -> dict[str, int]:
        widths = list(self.unet.config["block_out_channels"])
        return {f"in{i}": width for i, width in enumerate(widths)} | {"mid": widths[-1]}

    def trained_sigmas(self, sigmas: Sequence[float]) -> list[float]:
        if self.spacing == "even":
            return self.even_sigmas(len(sigmas))
        table = self.native_sigmas.double().cpu()
        return [float(table[(table.log() - math.log(sigma)).abs().argmin()]) for sigma in sigmas]

    def even_sigmas(self, steps: int) -> list[float]:
        """The sigmas of ``steps`` evenly spaced timesteps from the last one down, as in diffusers' ``LCMScheduler``.

        Raises:
            ValueError: more steps than timesteps.
        """
        table = self.native_sigmas.double().cpu()
        if steps > len(table):
            raise ValueError(f"this model has {len(table)} timesteps, {steps} steps were asked for")
        stride = len(table) // steps
        return [float(table[number * stride - 1]) for number in range(steps, 0, -1)]

    def init_noise_sigma(self, sigma: float) -> float:
        return math.sqrt(1 + sigma**2)  # the network sees unit variance, as in diffusers' pipelines

    takes_prompts = True

    def blank_condition(self, rows: int) -> Condition:
        return blank_text(rows, TOKENS, self.width, self.pooled)

    def _conditions(self, cond: Condition | None, count: int) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Token embeddings [B, L, D], their mask, and SDXL's added conditions."""
        cond = checked_text(cond, count, self.width, self.pooled)
        assert cond.tokens is not None
        tokens = cond.tokens.to(self.dtype)
        if cond.pooled is None:
            return tokens, cond.mask, {}
        sizes = (self.resolution, self.resolution, 0, 0, self.resolution, self.resolution)
        added = {
            "text_embeds": cond.pooled.to(self.dtype), "time_ids": tokens.new_tensor(sizes).expand(count, TIME_IDS)
        }  # fmt: skip
        return tokens, cond.mask, added


class StableDiffusion(DenoiserSource):
    """A diffusers Stable Diffusion model: 1.x, 2.x or XL.

        >>> source = StableDiffusion("models/stable-diffusion-v1-5", lora=LoRA(rank=32))

    Args:
        path: the pipeline's folder, with ``unet/``, ``vae/``, ``scheduler/`` and the text encoders; or the id of a
            model on Hugging Face, which :meth:`build` downloads unless its cache has it.
        resolution: side of the images in pixels; null: what the model was made for.
        spacing: where a few-step student's steps lie: at ``even`` timesteps from the last one down, as diffusers'
            ``LCMScheduler`` runs an exported student, whatever sigma_max and sigma_end are; or ``log_linear``, at the
            trained sigmas nearest to those of :func:`~unidad_pl.schedules.log_linear`. A single step is the last
            timestep's either way.
        lora: train adapters over the frozen UNet instead of all its weights; null: all weights. All networks of a run
            that start from this source share one UNet.
        unet_weights: file with the UNet's weights in place of the folder's, written by torch.save or as safetensors
            under diffusers' names, e.g. DMD2's ``pytorch_model.bin``, or OWNER/NAME/FILE of Hugging Face; null: the
            folder's.
        local_files_only: download nothing: what is neither a folder nor in the cache is an error.

    Raises:
        ValueError: an unknown spacing, or a resolution that no image has.
    """

    def __init__(
        self,
        path: str,
        resolution: int | None = None,
        spacing: Spacing = "even",
        lora: LoRA | None = None,
        unet_weights: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        check_given(path=path)
        check_path(path=path, unet_weights=unet_weights)
        check_choices(spacing=(spacing, Spacing))
        check_whole(1, MOST_SIDE, null=True, resolution=resolution)
        if lora is not None and not isinstance(lora, LoRA):
            raise ValueError(f"lora must be a LoRA or null, got {lora!r}")
        self.path, self.resolution, self.spacing = path, resolution, spacing
        self.lora, self.unet_weights = lora, unet_weights
        self._local_only = local_files_only

    def build(self) -> StableDiffusionUNet:
        """Load strictly.

        Raises:
            FileNotFoundError: a part is missing; names it.
            OSError: it must be downloaded and cannot; says why.
            ValueError: another kind of pipeline, a scheduler that is not supported, a file that is not what it should
                be, or weights that do not fit or are not finite.
            ModuleNotFoundError: adapters without peft.
        """
        own = [] if self.unet_weights else ["unet"]
        folder = find_pipeline(self.path, [*own, *CODEC], self._local_only)
        unet = self._checked(folder)
        given = self.unet_weights
        state = read_folder(folder / "unet") if given is None else read_weights(find_file(given, self._local_only))
        fill(unet, state, str(self.unet_weights or folder / "unet"))
        return self._denoiser(unet, folder)

    def codec(self) -> Codec:
        folder = find_pipeline(self.path, local_files_only=self._local_only)
        return LatentCodec(folder, self.resolution, partial(find_pipeline, self.path, CODEC, self._local_only))

    def architecture(self) -> StableDiffusionUNet:
        folder = find_pipeline(self.path, local_files_only=self._local_only)
        unet = self._checked(folder)
        return self._denoiser(type(unet).from_config(unet.config), folder)

    def _checked(self, folder: Path) -> Any:
        """The UNet that the config in ``folder`` describes, on the meta device, when it is seen to be supported."""
        from diffusers import UNet2DConditionModel

        return checked_network(UNet2DConditionModel, folder / "unet", lambda unet: self._network(unet, folder))

    def _network(self, unet: Any, folder: Path) -> StableDiffusionUNet:
        from diffusers import AutoencoderKL

        scheduler = find_scheduler(folder)
        assert scheduler is not None  # find_pipeline looked
        vae = checked_config(AutoencoderKL, folder / "vae")
        with reading(folder / "vae" / CONFIG_FILE, "config of an AutoencoderKL"):
            scale = 2 ** (len(vae["block_out_channels"]) - 1)
            if (channels := vae.get("latent_channels", 4)) != unet.config["in_channels"]:
                raise ValueError(f"its latents have {channels} channels, the UNet's {unet.config['in_channels']}")
        return StableDiffusionUNet(unet, spec_of_scheduler(scheduler), self.resolution, scale, self.spacing)

    def _denoiser(self, unet: Any, folder: Path) -> StableDiffusionUNet:
        network = self._network(unet, folder)
        if self.lora is not None:
            add_adapters(network.unet, self.lora, network.output_layer)
            network.shared_weights = base_names(network)
        return network.eval()

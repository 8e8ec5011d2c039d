"""Any unconditional or class-conditional diffusers ``UNet2DModel`` as a :class:`~unidad_pl.denoiser.Denoiser`."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unidad_pl.backbones.base import DiffusersNetwork, read_unet
from unidad_pl.backbones.spec import SCHEDULER_FILE, UNetSpec, find_scheduler, spec_of_scheduler
from unidad_pl.denoiser import DenoiserSource, PredictionType

if TYPE_CHECKING:
    from diffusers import UNet2DModel

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUILTIN = "builtin:"
DENOISER_FILE = "denoiser.json"
BIN_FILE = "diffusion_pytorch_model.bin"


class UNetDenoiser(DiffusersNetwork):
    """A diffusers ``UNet2DModel`` behind the sigma contract.

    Extra output channels (learned variance of guided-diffusion models) are dropped.

    Args:
        unet: the network; its parameters live under ``unet.`` in the state dict.
        spec: how to read it.

    Raises:
        ValueError: the network's channels do not fit ``spec.patch_size``, or its sample size is unknown.
    """

    every_layer = True

    def __init__(self, unet: UNet2DModel, spec: UNetSpec) -> None:
        size, fold = unet.config["sample_size"], spec.patch_size**2
        channels = unet.config["in_channels"]
        if size is None:
            raise ValueError("the UNet's config has no sample_size: set it to the side of its input in pixels")
        if channels % fold or unet.config["out_channels"] < channels:
            raise ValueError(
                f"a UNet with {channels} input and {unet.config['out_channels']} output channels does not fit "
                f"patch_size {spec.patch_size}: inputs must be a multiple of {fold}, outputs at least the inputs"
            )
        super().__init__(unet, spec)
        height, width = (size, size) if isinstance(size, int) else size
        self.image_shape = (channels // fold, height * spec.patch_size, width * spec.patch_size)
        self.num_classes = unet.config["num_class_embeds"]

    def _folded(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.spec.patch_size)

    def _output(self, x: Tensor, c_in: Tensor, time: Tensor, cond: Tensor | None) -> Tensor:
        folded = self._folded(c_in * x)
        out = self.unet(folded.to(self.dtype), time, class_labels=cond).sample[:, : folded.shape[1]]
        return F.pixel_shuffle(out, self.spec.patch_size)

    def _conditioned(self, emb: Tensor, cond: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if self.unet.class_embedding is not None:
            if cond is None:
                raise ValueError("this UNet is class-conditional: pass class labels as cond")
            emb = emb + self.unet.class_embedding(cond).to(self.dtype)
        return emb, {}

    @property
    def tap_channels(self) -> dict[str, int]:
        config = self.unet.config
        widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
        channels = [widths[0]]
        for level, width in enumerate(widths):
            channels += [width] * (layers + (level < len(widths) - 1))
        return {f"in{i}": c for i, c in enumerate(channels)} | {"mid": widths[-1]}

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json``, ``diffusion_pytorch_model.safetensors`` and ``denoiser.json`` into ``folder``."""
        same = self.unet.dtype == dtype
        (self.unet if same else copy.deepcopy(self.unet).to(dtype)).save_pretrained(folder)
        (Path(folder) / DENOISER_FILE).write_text(json.dumps(asdict(self.spec), indent=2) + "\n")


class PretrainedUNet(DenoiserSource):
    """A ``UNet2DModel`` folder with weights.

        >>> PretrainedUNet("builtin:cartoon_teacher").build().image_shape
        (3, 32, 32)

    Args:
        path: a folder with a network's ``config.json`` and weights, as diffusers writes it (a whole pipeline's folder,
            or its ``unet``), with ``scheduler_config.json`` beside it or in ``scheduler/``, which says what the network
            predicts and at which noise levels; or one written by :meth:`UNetDenoiser.save_pretrained`, where
            ``denoiser.json`` says so; or ``builtin:NAME`` for a model that ships with the package
            (``builtin:cartoon_teacher``).
    """

    def __init__(self, path: str = "builtin:cartoon_teacher") -> None:
        self.path = path

    def build(self) -> UNetDenoiser:
        """Load strictly.

        Raises:
            FileNotFoundError: a file is missing; names it and what to put there.
            ValueError: ``denoiser.json`` has an unknown entry, or weights are missing or unexpected.
        """
        from diffusers import UNet2DModel

        folder = self._unet_folder()
        spec = self._spec(folder)
        unet = read_unet(UNet2DModel, folder, use_safetensors=not (folder / BIN_FILE).is_file() or None)
        return UNetDenoiser(unet, spec).eval()

    def architecture(self) -> UNetDenoiser:
        from diffusers import UNet2DModel

        folder = self._unet_folder()
        return UNetDenoiser(UNet2DModel.from_config(UNet2DModel.load_config(folder)), self._spec(folder)).eval()

    def _unet_folder(self) -> Path:
        top = ASSETS / self.path.removeprefix(BUILTIN) if self.path.startswith(BUILTIN) else Path(self.path)
        for folder in (top, top / "unet"):
            if (folder / "config.json").is_file():
                return folder
        raise FileNotFoundError(
            f"source model {self.path!r} has no config.json (looked in {top} and its unet/). A source folder holds "
            f"config.json, diffusion_pytorch_model.safetensors and {SCHEDULER_FILE}."
        )

    def _spec(self, folder: Path) -> UNetSpec:
        if (folder / DENOISER_FILE).is_file():
            entries = json.loads((folder / DENOISER_FILE).read_text())
            unknown = set(entries) - set(UNetSpec.__dataclass_fields__)
            if unknown:
                raise ValueError(f"{folder / DENOISER_FILE} has unknown entries {sorted(unknown)}")
            return UNetSpec(**entries)
        scheduler = find_scheduler(folder)
        if scheduler is None:
            raise FileNotFoundError(
                f"source model {self.path!r} has neither {SCHEDULER_FILE} (beside config.json, or in scheduler/) nor "
                f'{DENOISER_FILE}, which say what the network predicts: {{"prediction": "epsilon"}} for a DDPM.'
            )
        return spec_of_scheduler(scheduler)


class NewUNet(DenoiserSource):
    """A randomly initialised ``UNet2DModel``, for training from scratch.

        >>> list(NewUNet(channels=(32, 64), attention_levels=(1,)).build().tap_channels)
        ['in0', 'in1', 'in2', 'in3', 'mid']

    Args:
        resolution: image side in pixels.
        channels: widths of the levels, finest first.
        layers: residual blocks per level.
        attention_levels: levels (0 = finest) with self-attention.
        head_channels: channels per attention head.
        norm_groups: groups of every GroupNorm; must divide all channels.
        image_channels: colour channels.
        num_classes: number of class labels; null for an unconditional model.
        dropout: dropout inside residual blocks.
        prediction, sigma_data, patch_size: see :class:`UNetSpec`.
    """

    def __init__(
        self,
        resolution: int = 32,
        channels: tuple[int, ...] = (32, 64, 128),
        layers: int = 1,
        attention_levels: tuple[int, ...] = (1, 2),
        head_channels: int = 32,
        norm_groups: int = 8,
        image_channels: int = 3,
        num_classes: int | None = None,
        dropout: float = 0.0,
        prediction: PredictionType = "edm",
        sigma_data: float = 0.5,
        patch_size: int = 2,
    ) -> None:
        if resolution % (factor := patch_size * 2 ** (len(channels) - 1)):
            raise ValueError(f"resolution {resolution} must be divisible by patch_size * 2^(levels - 1) = {factor}")
        for level in {*attention_levels, len(channels) - 1}:  # the middle block always attends
            if not 0 <= level < len(channels) or channels[level] % head_channels:
                raise ValueError(
                    f"attention at level {level} needs channels that head_channels={head_channels} divides; the "
                    f"channels are {list(channels)}"
                )
        self.spec = UNetSpec(prediction=prediction, sigma_data=sigma_data, patch_size=patch_size)
        attention = [level in attention_levels for level in range(len(channels))]
        self.config: dict[str, Any] = dict(
            sample_size=resolution // patch_size, block_out_channels=tuple(channels), layers_per_block=layers,
            in_channels=image_channels * patch_size**2, out_channels=image_channels * patch_size**2,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            downsample_padding=1, attention_head_dim=head_channels, norm_num_groups=norm_groups,
            attn_norm_num_groups=norm_groups, resnet_time_scale_shift="scale_shift", num_class_embeds=num_classes,
            dropout=dropout,
        )  # fmt: skip

    def build(self) -> UNetDenoiser:
        """Make the network with diffusers' default initialisation, from torch's global random state."""
        from diffusers import UNet2DModel

        return UNetDenoiser(UNet2DModel(**self.config), self.spec).eval()

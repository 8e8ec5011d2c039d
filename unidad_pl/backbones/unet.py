"""Any unconditional or class-conditional diffusers ``UNet2DModel`` as a :class:`~unidad_pl.denoiser.Denoiser`."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidad_pl.backbones.base import checked_labels
from unidad_pl.backbones.folders import (
    CONFIG_FILE,
    MOST,
    MOST_SIDE,
    checked_network,
)
from unidad_pl.backbones.hub import find_folder
from unidad_pl.backbones.spec import SCHEDULER_FILE, UNetSpec, find_scheduler, spec_of_scheduler
from unidad_pl.backbones.unets import DiffusersUNet
from unidad_pl.backbones.weights import NETWORK, Stems, fill, read_folder
from unidad_pl.checks import check_at_least, check_given, check_path, check_whole
from unidad_pl.condition import Condition
from unidad_pl.denoiser import DenoiserSource, PredictionType
from unidad_pl.files import read_json, reading

if TYPE_CHECKING:
    from diffusers import UNet2DModel

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUILTIN = "builtin:"
DENOISER_FILE = "denoiser.json"
FOLDERS = ("", "unet", "scheduler")
"""Where a model's folder has what is read of it."""


class UNetDenoiser(DiffusersUNet):
    """A diffusers ``UNet2DModel`` behind the sigma contract.

    Extra output channels (learned variance of guided-diffusion models) are dropped.

    Args:
        unet: the network; its parameters live under ``unet.`` in the state dict.
        spec: how to read it.

    Raises:
        ValueError: the network's channels do not fit ``spec.patch_size``, its sample size is unknown, or it takes
            another time or class input than numbers of timesteps and of classes.
    """

    every_layer = True
    blocks = frozenset({
        "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D",
        "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D", "UNetMidBlock2D",
        None,
    })  # fmt: skip

    def __init__(self, unet: UNet2DModel, spec: UNetSpec) -> None:
        size, fold = unet.config["sample_size"], spec.patch_size**2
        channels = unet.config["in_channels"]
        embedding, labels = unet.config["time_embedding_type"], unet.config["class_embed_type"]
        if embedding != "positional" or labels is not None:
            raise ValueError(
                f"a UNet with time_embedding_type {embedding!r} and class_embed_type {labels!r} is not supported: "
                f"they must be 'positional' and null"
            )
        if size is None:
            raise ValueError("the UNet's config has no sample_size: set it to the side of its input in pixels")
        if channels % fold or unet.config["out_channels"] < channels:
            raise ValueError(
                f"a UNet with {channels} input and {unet.config['out_channels']} output channels does not fit "
                f"patch_size {spec.patch_size}: inputs must be a multiple of {fold}, outputs at least the inputs"
            )
        if not unet.down_blocks:
            raise ValueError("the UNet's config has no levels")
        super().__init__(unet, spec)
        height, width = (size, size) if isinstance(size, int) else size
        self.image_shape = (channels // fold, height * spec.patch_size, width * spec.patch_size)
        self.num_classes = unet.config["num_class_embeds"]

    def _folded(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.spec.patch_size)

    def _output(self, scaled: Tensor, time: Tensor, cond: Condition | None) -> Tensor:
        folded = self._folded(scaled)
        out = self.unet(folded.to(self.dtype), time, class_labels=self._labels(cond, len(scaled))).sample
        return F.pixel_shuffle(out[:, : folded.shape[1]], self.spec.patch_size)

    def _conditioned(self, emb: Tensor, cond: Condition | None) -> tuple[Tensor, dict[str, Tensor]]:
        labels = self._labels(cond, len(emb))
        return (emb if labels is None else emb + self.unet.class_embedding(labels).to(self.dtype)), {}

    def _labels(self, cond: Condition | None, count: int) -> Tensor | None:
        if self.num_classes is not None:
            return checked_labels(cond, count).labels
        if cond is not None:
            raise ValueError(f"this network takes no condition, got {cond!r:.80}")
        return None

    @property
    def tap_channels(self) -> dict[str, int]:
        config = self.unet.config
        widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
        channels = [widths[0]]
        for level, width in enumerate(widths):
            channels += [width] * (layers + (level < len(widths) - 1))
        taps = {f"in{i}": c for i, c in enumerate(channels)}
        return taps if self.unet.mid_block is None else taps | {"mid": widths[-1]}

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json``, ``diffusion_pytorch_model.safetensors`` and ``denoiser.json`` into ``folder``."""
        same = self.unet.dtype == dtype
        saved = self.unet if same else nn.Module.to(copy.deepcopy(self.unet), dtype)  # diffusers' own `to` warns
        saved.save_pretrained(folder)
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
            (``builtin:cartoon_teacher``); or the id of a model on Hugging Face, such as ``google/ddpm-celebahq-256``,
            which :meth:`build` downloads unless its cache has it.
        local_files_only: download nothing: what is neither a folder nor in the cache is an error.
    """

    def __init__(self, path: str = "builtin:cartoon_teacher", local_files_only: bool = False) -> None:
        check_given(path=path)
        check_path(path=path)
        self.path, self._local_only = path, local_files_only

    def build(self) -> UNetDenoiser:
        """Load strictly.

        Raises:
            FileNotFoundError: a file is missing; names it and what to put there.
            OSError: it must be downloaded and cannot; says why.
            ValueError: a file that is not what it should be, a network that is not supported, or weights that are
                missing, unexpected or not finite.
        """
        folder = self._unet_folder(weights=True)
        unet, spec = self._checked(folder)
        fill(unet, read_folder(folder), str(folder))
        return UNetDenoiser(unet, spec).eval()

    def architecture(self) -> UNetDenoiser:
        unet, spec = self._checked(self._unet_folder())
        return UNetDenoiser(type(unet).from_config(unet.config), spec).eval()

    def _checked(self, folder: Path) -> tuple[Any, UNetSpec]:
        """The UNet that ``folder`` describes, on the meta device, when it is seen to be supported; how to read it."""
        from diffusers import UNet2DModel

        spec = self._spec(folder)
        return checked_network(UNet2DModel, folder, lambda unet: UNetDenoiser(unet, spec)), spec

    def _unet_folder(self, weights: bool = False) -> Path:
        """The network's folder, in it its config, and its weights where they are asked for."""

        def needed(top: Path) -> dict[str, Stems]:
            folder = self._folder_in(top)
            self._spec(folder)
            return {folder.relative_to(top).as_posix().strip("."): NETWORK} if weights else {}

        if self.path.startswith(BUILTIN):
            return self._folder_in(ASSETS / self.path.removeprefix(BUILTIN))
        return self._folder_in(find_folder(self.path, FOLDERS, needed, self._local_only))

    def _folder_in(self, top: Path) -> Path:
        for folder in (top, top / "unet"):
            if (folder / CONFIG_FILE).is_file():
                return folder
        raise FileNotFoundError(
            f"source model {self.path!r} has no config.json (looked in {top} and its unet/). A source folder holds "
            f"config.json, diffusion_pytorch_model.safetensors and {SCHEDULER_FILE}."
        )

    def _spec(self, folder: Path) -> UNetSpec:
        if (folder / DENOISER_FILE).is_file():
            entries = read_json(folder / DENOISER_FILE, "description of a denoiser")
            with reading(folder / DENOISER_FILE, "description of a denoiser"):
                if unknown := set(entries) - set(UNetSpec.__dataclass_fields__):
                    raise ValueError(f"it has unknown entries {sorted(unknown)}")
                return UNetSpec(**entries)
        scheduler = find_scheduler(folder)
        if scheduler is None:
            raise FileNotFoundError(
                f"source model {self.path!r} has neither {SCHEDULER_FILE} (beside config.json, or in scheduler/) nor "
                f'{DENOISER_FILE}, which say what the network predicts: {{"prediction": "epsilon"}} for a DDPM.'
            )
        return spec_of_scheduler(scheduler)


def _check_levels(channels: tuple[int, ...], attention_levels: tuple[int, ...], norm_groups: int) -> None:
    for name, levels in (("channels", channels), ("attention_levels", attention_levels)):
        if not isinstance(levels, (list, tuple)) or len(levels) > 16:
            raise ValueError(f"{name} must be a list of at most 16 whole numbers, got {levels!r}")
    if not channels:
        raise ValueError("channels must have a width for at least one level")
    for width in channels:
        check_whole(1, MOST_SIDE, channels=width)
        if width % norm_groups:
            raise ValueError(f"norm_groups must divide all channels {list(channels)}, got {norm_groups}")
    for level in attention_levels:
        check_whole(0, 15, attention_levels=level)


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

    Raises:
        ValueError: a number out of range, or numbers that do not fit each other; names the option.
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
        self.spec = UNetSpec(prediction=prediction, sigma_data=sigma_data, patch_size=patch_size)
        check_given(dropout=dropout)
        check_whole(1, MOST_SIDE, resolution=resolution, head_channels=head_channels, norm_groups=norm_groups)
        check_whole(1, 64, layers=layers, image_channels=image_channels)
        check_whole(1, MOST, null=True, num_classes=num_classes)
        check_at_least(0, 1, dropout=dropout)
        _check_levels(channels, attention_levels, norm_groups)
        if resolution % (factor := patch_size * 2 ** (len(channels) - 1)):
            raise ValueError(f"resolution {resolution} must be divisible by patch_size * 2^(levels - 1) = {factor}")
        for level in {*attention_levels, len(channels) - 1}:  # the middle block always attends
            if level >= len(channels) or channels[level] % head_channels:
                raise ValueError(
                    f"attention at level {level} needs channels that head_channels={head_channels} divides; the "
                    f"channels are {list(channels)}"
                )
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

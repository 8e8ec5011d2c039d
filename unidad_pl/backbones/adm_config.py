"""The flags of OpenAI guided-diffusion (ADM) networks, and the ``UNet2DModel`` that computes the same function.

Head width, order of the attention rows and the time embedding cannot be read off the weights (a wrong value loads and
is silently wrong), so a config always accompanies a checkpoint. Reference: openai/guided-diffusion, ``script_util.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from unidad_pl.backbones.folders import MOST, MOST_SIDE
from unidad_pl.backbones.spec import MOST_TIMESTEPS, UNetSpec
from unidad_pl.checks import check_at_least, check_given, check_whole
from unidad_pl.files import expanded, read_json, reading

CHANNEL_MULT = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4"}
"""What an empty ``channel_mult`` means, by image size."""

WITHOUT_EFFECT = (
    "num_heads", "num_heads_upsample",  # num_head_channels overrides both
    "use_checkpoint", "use_fp16", "timestep_respacing", "use_kl", "rescale_learned_sigmas",
)  # fmt: skip
"""Flags of guided-diffusion that change neither the network's function nor how it is read."""


@dataclass(frozen=True)
class ADMConfig:
    """The flags of guided-diffusion that define a network, under their own names and with their own defaults.

    Attributes:
        image_size: side of the image in pixels.
        num_channels: width of the finest level.
        num_res_blocks: residual blocks per level.
        channel_mult: width of each level as a multiple of ``num_channels``, finest first, ``"1,2,4"``; empty means
            guided-diffusion's choice for the image size. The first must be 1.
        attention_resolutions: sides of the feature maps that have self-attention, ``"32,16,8"``.
        num_head_channels: channels per attention head; -1 (a fixed number of heads) is not supported.
        resblock_updown: residual blocks change the resolution, instead of strided convolution and upsampling.
        use_scale_shift_norm: the time embedding scales and shifts, instead of being added.
        use_new_attention_order: rows of ``qkv`` are [3, heads, channels], instead of [heads, 3, channels].
        learn_sigma: twice the output channels; the second half is the variance, which a denoiser drops.
        class_cond: a class-conditional network.
        num_classes: number of classes if ``class_cond``; null is guided-diffusion's constant, 1000.
        dropout: dropout inside residual blocks, in training mode only.
        in_channels: colour channels.
        diffusion_steps: length of the schedule.
        noise_schedule: ``linear`` or ``cosine``.
        predict_xstart: the network predicts the clean image, not the noise.
        rescale_timesteps: must not change anything, that is ``diffusion_steps`` must then be 1000.

    Raises:
        ValueError: a combination that a ``UNet2DModel`` cannot represent; names the flag.
    """

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: str = ""
    attention_resolutions: str = "16,8"
    num_head_channels: int = -1
    resblock_updown: bool = False
    use_scale_shift_norm: bool = True
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    class_cond: bool = False
    num_classes: int | None = None
    dropout: float = 0.0
    in_channels: int = 3
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    predict_xstart: bool = False
    rescale_timesteps: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        if not self.channel_mult and self.image_size not in CHANNEL_MULT:
            raise ValueError(f"channel_mult is empty and has no default for image_size {self.image_size}: write it out")
        first = (self.channel_mult or CHANNEL_MULT[self.image_size]).split(",")[0]
        if self.widths[0] != self.num_channels:
            raise ValueError(
                f"channel_mult must start with 1, got {first!r}: guided-diffusion's time embedding is num_channels "
                f"wide, a UNet2DModel's is as wide as its first level"
            )
        if self.num_head_channels < 1:
            raise ValueError(
                f"num_head_channels must be set, got {self.num_head_channels}: a fixed num_heads gives each level its "
                f"own head width, and a UNet2DModel has one for all"
            )
        for level, width in enumerate(self.widths):
            # the deepest level counts whatever its attention flag says: the middle block has attention
            if (self.attention[level] or level == len(self.widths) - 1) and width % self.num_head_channels:
                raise ValueError(f"num_head_channels {self.num_head_channels} does not divide the {width} channels")
        if self.noise_schedule not in ("linear", "cosine"):
            raise ValueError(f"noise_schedule must be 'linear' or 'cosine', got {self.noise_schedule!r}")
        if self.rescale_timesteps and self.diffusion_steps != 1000:
            raise ValueError(f"rescale_timesteps needs diffusion_steps 1000, got {self.diffusion_steps}")

    def _check_numbers(self) -> None:
        check_given(**{name: value for name, value in vars(self).items() if name != "num_classes"})
        check_whole(1, MOST_SIDE, null=True, image_size=self.image_size, num_channels=self.num_channels)
        check_whole(1, 64, null=True, num_res_blocks=self.num_res_blocks, in_channels=self.in_channels)
        check_whole(-1, MOST_SIDE, null=True, num_head_channels=self.num_head_channels)
        check_whole(1, MOST, null=True, num_classes=self.num_classes)
        check_whole(
            25 if self.noise_schedule == "linear" else 2,
            MOST_TIMESTEPS,
            null=True,
            diffusion_steps=self.diffusion_steps,
        )
        check_at_least(0, 1, dropout=self.dropout)
        for name, kind in get_type_hints(ADMConfig).items():
            if kind in (bool, str) and not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        try:
            widths, attention = self.widths if self.channel_mult else (self.num_channels,), self.attention_sides
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"channel_mult and attention_resolutions must be numbers with commas between, like '1,2,4', got "
                f"{self.channel_mult!r} and {self.attention_resolutions!r}"
            ) from error
        for width in widths:
            check_whole(1, MOST_SIDE, null=True, channel_mult=width)
        for side in attention:
            check_whole(1, MOST_SIDE, null=True, attention_resolutions=side)
        if len(widths) > 12:
            raise ValueError(f"channel_mult must give at most 12 levels, got {len(widths)}")

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> ADMConfig:
        """A config from a mapping of flags; those without effect on the result are dropped.

        Values may be text, as guided-diffusion's command line takes them (``"True"``, ``"1000"``), and lists stand for
        numbers with commas between.

        Raises:
            ValueError: an unknown flag, or an unsupported value.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(flags) - known - set(WITHOUT_EFFECT))
        if unknown:
            raise ValueError(f"unknown guided-diffusion flags {unknown}: known are {sorted(known)}")
        return cls(**{name: _of_flag(name, value) for name, value in flags.items() if name in known})

    @classmethod
    def preset(cls, name: str) -> ADMConfig:
        """The flags of the published model ``name``, a key of :data:`PRESETS`.

        Raises:
            ValueError: no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"no ADM preset {name!r}: there are {', '.join(PRESETS)}; else give a JSON file of flags")
        return PRESETS[name]

    @classmethod
    def load(cls, name: str | Path) -> ADMConfig:
        """The preset called ``name`` (see :data:`PRESETS`), or the flags in the JSON file ``name``.

        Raises:
            FileNotFoundError: neither a preset nor a file.
            ValueError: the file is not a JSON object of known flags.
        """
        if str(name) in PRESETS:
            return PRESETS[str(name)]
        name = expanded(name)
        if not name.is_file():
            raise FileNotFoundError(
                f"ADM config {str(name)!r} is neither a file nor a preset ({', '.join(PRESETS)}). Write the flags the "
                f"checkpoint was trained with into a JSON file."
            )
        flags = read_json(Path(name), "ADM config")
        with reading(name, "ADM config"):
            return cls.from_flags(flags)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        multiples = (self.channel_mult or CHANNEL_MULT[self.image_size]).split(",")
        return tuple(int(float(multiple) * self.num_channels) for multiple in multiples)

    @property
    def attention_sides(self) -> tuple[int, ...]:
        """Sides of the feature maps with self-attention."""
        return tuple(int(side) for side in self.attention_resolutions.split(",") if side.strip())

    @property
    def attention(self) -> tuple[bool, ...]:
        """Whether each level has self-attention, finest first."""
        factors = {self.image_size // side for side in self.attention_sides}
        return tuple(2**level in factors for level in range(len(self.widths)))

    @property
    def classes(self) -> int | None:
        """Number of classes; None for an unconditional network."""
        return (self.num_classes or 1000) if self.class_cond else None

    @property
    def spec(self) -> UNetSpec:
        """How the network is read. Guided-diffusion scales the betas so that any length ends at the same noise."""
        scale = 1000 / self.diffusion_steps
        return UNetSpec(
            prediction="sample" if self.predict_xstart else "epsilon", timestep="nearest",
            beta_schedule="linear" if self.noise_schedule == "linear" else "squaredcos_cap_v2",
            beta_start=1e-4 * scale, beta_end=0.02 * scale, train_timesteps=self.diffusion_steps,
        )  # fmt: skip


BOOLEANS = {
    "true": True, "yes": True, "t": True, "y": True, "1": True, "false": False, "no": False, "f": False, "n": False,
    "0": False,
}  # fmt: skip
"""What guided-diffusion's command line takes for flags that are on or off."""


def _of_flag(name: str, value: Any) -> Any:
    """The value of the option ``name`` that a flag stands for, which may be its text; what is none stays as it is."""
    kind = get_type_hints(ADMConfig)[name]
    if kind is str and name != "noise_schedule":
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if kind is bool:
        return BOOLEANS.get(str(value).lower(), value)
    if isinstance(value, str) and kind is not str:
        if value in ("", "None"):
            return None
        with suppress(ValueError):
            return float(value) if kind is float else int(value)
    return value


_LSUN = ADMConfig(
    image_size=256, num_channels=256, attention_resolutions="32,16,8", num_head_channels=64, resblock_updown=True,
    learn_sigma=True,
)  # fmt: skip

# Some were trained with dropout 0.1, which acts in training mode only.
PRESETS = {
    "ffhq256": _LSUN,
    "lsun256": _LSUN,
    "imagenet64": replace(
        _LSUN, image_size=64, num_channels=192, num_res_blocks=3, use_new_attention_order=True, class_cond=True,
        noise_schedule="cosine",
    ),
    "imagenet256": replace(_LSUN, class_cond=True),
    "imagenet256_uncond": _LSUN,
}  # fmt: skip
"""The published models that a ``UNet2DModel`` represents. Not among them: ImageNet 128 (a fixed number of heads)
and 512 (``channel_mult`` starts with 0.5)."""

PUBLISHED = {
    "ffhq256": "the FFHQ-256 model, ffhq.pt of ddpm-segmentation,",
    "lsun256": "lsun_bedroom.pt, lsun_cat.pt or lsun_horse.pt of guided-diffusion",
    "imagenet64": "64x64_diffusion.pt of guided-diffusion",
    "imagenet256": "256x256_diffusion.pt of guided-diffusion",
    "imagenet256_uncond": "256x256_diffusion_uncond.pt of guided-diffusion",
}
"""Which published file a preset is for."""


def unet2d_config(adm: ADMConfig) -> dict[str, Any]:
    """Constructor arguments of the ``UNet2DModel`` that computes the same function as the ADM network."""
    plain, resample = ("ResnetDownsampleBlock2D", "resnet") if adm.resblock_updown else ("DownBlock2D", "conv")
    down = ["AttnDownBlock2D" if attention else plain for attention in adm.attention]
    return dict(
        sample_size=adm.image_size, in_channels=adm.in_channels,
        out_channels=adm.in_channels * (2 if adm.learn_sigma else 1),
        down_block_types=tuple(down), up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        block_out_channels=adm.widths, layers_per_block=adm.num_res_blocks,
        downsample_type=resample, upsample_type=resample, downsample_padding=1,
        time_embedding_type="positional", flip_sin_to_cos=True, freq_shift=0, act_fn="silu",
        attention_head_dim=adm.num_head_channels, norm_num_groups=32, norm_eps=1e-5,
        attn_norm_num_groups=32,  # without it the middle attention loses its norm under scale_shift
        resnet_time_scale_shift="scale_shift" if adm.use_scale_shift_norm else "default",
        num_class_embeds=adm.classes, dropout=adm.dropout,
    )  # fmt: skip

"""OpenAI guided-diffusion (ADM) checkpoints as diffusers ``UNet2DModel``: every parameter maps one to one, both ways.

Reference: openai/guided-diffusion, ``unet.py``. With L residual blocks per level, block j of level v (0 = finest) is
``input_blocks.[1 + v(L+1) + j]``, and the one at ``j = L`` changes the resolution; ``output_blocks`` run from the
deepest level, L + 1 blocks each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unidad_pl.backbones.adm_config import PUBLISHED, ADMConfig, unet2d_config
from unidad_pl.backbones.hub import find_file
from unidad_pl.backbones.unet import UNetDenoiser
from unidad_pl.backbones.weights import State, check_finite, read_weights
from unidad_pl.checks import check_given, check_path
from unidad_pl.denoiser import DenoiserSource
from unidad_pl.files import BrokenFile

Rule = Literal["same", "conv1d", "qkv"]


class ADMStateDictAdapter:
    """Renames and reshapes weights between guided-diffusion and ``UNet2DModel``. The two methods are exact inverses.

    Only names, order and shape change, never a number or a dtype, so gradients can be mapped just as well. The one
    real change is attention: a ``qkv`` tensor becomes three.

    Args:
        adm: the flags of the network.
    """

    def __init__(self, adm: ADMConfig) -> None:
        self.head = adm.num_head_channels
        self.new_order = adm.use_new_attention_order
        self.table: dict[str, tuple[tuple[str, ...], Rule]] = dict(_parameters(adm))
        """ADM name -> (diffusers names, rule), in order of the network."""

    def to_diffusers(self, state: Mapping[str, Tensor]) -> State:
        """Guided-diffusion names -> ``UNet2DModel`` names.

        Raises:
            ValueError: missing or unexpected keys, or a ``qkv`` whose rows are not three times a number of heads.
        """
        _check_keys("guided-diffusion", set(self.table), set(state))
        result: State = {}
        for ours, (theirs, rule) in self.table.items():
            value = state[ours]
            if rule != "same" and value.ndim == 3:  # Conv1d of width 1 -> Linear
                value = value[..., 0]
            parts = self._split(ours, value) if rule == "qkv" else (value,)
            result.update(zip(theirs, parts, strict=True))
        return result

    def from_diffusers(self, state: Mapping[str, Tensor]) -> State:
        """``UNet2DModel`` names -> guided-diffusion names.

        Raises:
            ValueError: missing or unexpected keys.
        """
        _check_keys("UNet2DModel", {name for theirs, _ in self.table.values() for name in theirs}, set(state))
        result: State = {}
        for ours, (theirs, rule) in self.table.items():
            values = [state[name] for name in theirs]
            value = self._merge(values) if rule == "qkv" else values[0]
            result[ours] = value[..., None] if rule != "same" and value.ndim == 2 else value
        return result

    def _split(self, name: str, value: Tensor) -> tuple[Tensor, ...]:
        """[3C, ...] -> q, k, v, each [C, ...]."""
        rows, rest = value.shape[0], value.shape[1:]
        if rows % (3 * self.head):
            raise ValueError(f"{name} has {rows} rows, not a multiple of 3 * num_head_channels = {3 * self.head}")
        parts = value.chunk(3) if self.new_order else value.reshape(-1, 3, self.head, *rest).unbind(1)
        return tuple(part.reshape(rows // 3, *rest).clone() for part in parts)  # parameters must not share memory

    def _merge(self, values: list[Tensor]) -> Tensor:
        """q, k, v, each [C, ...] -> [3C, ...]."""
        if self.new_order:
            return torch.cat(values)
        rest = values[0].shape[1:]
        return torch.stack([value.reshape(-1, self.head, *rest) for value in values], 1).reshape(-1, *rest)


def _check_keys(kind: str, expected: set[str], seen: set[str]) -> None:
    if expected != seen:
        missing, unexpected = sorted(expected - seen), sorted(seen - expected)
        raise ValueError(
            f"{kind} weights do not fit the config: {len(missing)} keys missing {_some(missing)}, "
            f"{len(unexpected)} unexpected {_some(unexpected)}"
        )


def _some(names: list[str]) -> str:
    return f"[{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}]"


def _parameters(adm: ADMConfig) -> Iterator[tuple[str, tuple[tuple[str, ...], Rule]]]:
    """(ADM name, (diffusers names, rule)) of every parameter."""
    for ours, theirs, rule in _layers(adm):
        for suffix in ("weight",) if ours == "label_emb" else ("weight", "bias"):
            names = [f"{theirs}.to_{part}" for part in "qkv"] if rule == "qkv" else [theirs]
            yield f"{ours}.{suffix}", (tuple(f"{name}.{suffix}" for name in names), rule)


def _layers(adm: ADMConfig) -> Iterator[tuple[str, str, Rule]]:
    """(ADM layer, diffusers layer, rule) of the network."""
    levels, blocks = len(adm.widths), adm.num_res_blocks
    yield "time_embed.0", "time_embedding.linear_1", "same"
    yield "time_embed.2", "time_embedding.linear_2", "same"
    if adm.class_cond:
        yield "label_emb", "class_embedding", "same"
    yield "input_blocks.0.0", "conv_in", "same"
    for level in range(levels):
        start, down = 1 + level * (blocks + 1), f"down_blocks.{level}"
        for j in range(blocks):
            changes = j == 0 and level > 0 and adm.widths[level] != adm.widths[level - 1]
            yield from _residual(f"input_blocks.{start + j}.0", f"{down}.resnets.{j}", shortcut=changes)
            if adm.attention[level]:
                yield from _attention(f"input_blocks.{start + j}.1", f"{down}.attentions.{j}")
        if level < levels - 1:
            yield from _resample(f"input_blocks.{start + blocks}.0", f"{down}.downsamplers.0", "op", adm)
    yield from _residual("middle_block.0", "mid_block.resnets.0", shortcut=False)
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _residual("middle_block.2", "mid_block.resnets.1", shortcut=False)
    for number, level in enumerate(reversed(range(levels))):
        start, up = number * (blocks + 1), f"up_blocks.{number}"
        for j in range(blocks + 1):  # each joins a skip connection, so its input is always wider than its output
            yield from _residual(f"output_blocks.{start + j}.0", f"{up}.resnets.{j}", shortcut=True)
            if adm.attention[level]:
                yield from _attention(f"output_blocks.{start + j}.1", f"{up}.attentions.{j}")
        if level > 0:
            place = f"output_blocks.{start + blocks}.{2 if adm.attention[level] else 1}"
            yield from _resample(place, f"{up}.upsamplers.0", "conv", adm)
    yield "out.0", "conv_norm_out", "same"
    yield "out.2", "conv_out", "same"


def _residual(ours: str, theirs: str, shortcut: bool) -> Iterator[tuple[str, str, Rule]]:
    yield f"{ours}.in_layers.0", f"{theirs}.norm1", "same"
    yield f"{ours}.in_layers.2", f"{theirs}.conv1", "same"
    yield f"{ours}.emb_layers.1", f"{theirs}.time_emb_proj", "same"
    yield f"{ours}.out_layers.0", f"{theirs}.norm2", "same"
    yield f"{ours}.out_layers.3", f"{theirs}.conv2", "same"
    if shortcut:
        yield f"{ours}.skip_connection", f"{theirs}.conv_shortcut", "same"


def _attention(ours: str, theirs: str) -> Iterator[tuple[str, str, Rule]]:
    yield f"{ours}.norm", f"{theirs}.group_norm", "same"
    yield f"{ours}.qkv", theirs, "qkv"
    yield f"{ours}.proj_out", f"{theirs}.to_out.0", "conv1d"


def _resample(ours: str, theirs: str, conv: str, adm: ADMConfig) -> Iterator[tuple[str, str, Rule]]:
    if adm.resblock_updown:
        yield from _residual(ours, theirs, shortcut=False)
    else:
        yield f"{ours}.{conv}", f"{theirs}.conv", "same"


def adm_denoiser(adm: ADMConfig, state: Mapping[str, Tensor]) -> UNetDenoiser:
    """The denoiser with guided-diffusion weights ``state``, in their dtype, on the current default device, eval mode.

    The tensors are used as they are, not copied, where name and shape alone change.

    Raises:
        ValueError: missing or unexpected keys, wrong shapes or values that are not finite, under their
            guided-diffusion names.
    """
    from diffusers import UNet2DModel

    with torch.device("meta"):  # weights replace everything: nothing to initialise
        unet = UNet2DModel(**unet2d_config(adm))
    adapter = ADMStateDictAdapter(adm)
    expected = adapter.from_diffusers(unet.state_dict())
    _check_keys("guided-diffusion", set(expected), set(state))
    shapes = {name: (tuple(state[name].shape), tuple(value.shape)) for name, value in expected.items()}
    wrong = [f"{name} has {seen} instead of {wanted}" for name, (seen, wanted) in shapes.items() if seen != wanted]
    if wrong:
        raise ValueError(f"guided-diffusion weights do not fit the config: {len(wrong)} wrong shapes {_some(wrong)}")
    check_finite(state, "guided-diffusion weights")
    unet.load_state_dict(adapter.to_diffusers(state), strict=True, assign=True)
    return UNetDenoiser(unet.to(torch.get_default_device()), adm.spec).eval()


def read_adm(adm: ADMConfig, checkpoint: Path) -> UNetDenoiser:
    """:func:`adm_denoiser` with the weights in a file.

    Raises:
        FileNotFoundError: there is none.
        BrokenFile: it cannot be read, or does not fit the flags; names file, keys and shapes.
    """
    state = read_weights(checkpoint)
    try:
        return adm_denoiser(adm, state)
    except ValueError as error:
        raise BrokenFile(f"{str(checkpoint)!r}: {error}") from error


class ADMSource(DenoiserSource):
    """A guided-diffusion checkpoint, such as FFHQ 256x256 of ddpm-segmentation.

        >>> source = ADMSource("models/ffhq.pt", "ffhq256")  # nothing is read before source.build()

    Args:
        checkpoint: a file written by ``torch.save`` or as ``.safetensors``, see
            :func:`~unidad_pl.backbones.weights.read_weights`; or OWNER/NAME/FILE of Hugging Face, which :meth:`build`
            downloads unless its cache has it.
        config: what the checkpoint's flags were: the path of a JSON file of guided-diffusion flags, a preset
            (``ffhq256``), or the flags themselves.
        local_files_only: download nothing.
    """

    def __init__(self, checkpoint: str, config: str | ADMConfig, local_files_only: bool = False) -> None:
        check_given(checkpoint=checkpoint, config=config)
        check_path(checkpoint=checkpoint)
        if not isinstance(config, ADMConfig):
            check_path(config=config)
        self.checkpoint, self.config, self._local_only = checkpoint, config, local_files_only

    def build(self) -> UNetDenoiser:
        """Load strictly, as float32.

        Raises:
            FileNotFoundError: checkpoint or config is missing.
            OSError: it must be downloaded and cannot; says why.
            ValueError: they cannot be read, or do not fit each other; names keys and shapes.
        """
        adm = self._adm()
        checkpoint = find_file(self.checkpoint, self._local_only)
        if not checkpoint.is_file() and self.config in PUBLISHED:
            raise FileNotFoundError(
                f"no ADM checkpoint at {self.checkpoint!r}: put {PUBLISHED[str(self.config)]} there, or give its path "
                f"as --model.source.init_args.checkpoint"
            )
        return read_adm(adm, checkpoint).float()

    def architecture(self) -> UNetDenoiser:
        from diffusers import UNet2DModel

        adm = self._adm()
        return UNetDenoiser(UNet2DModel(**unet2d_config(adm)), adm.spec).eval()

    def _adm(self) -> ADMConfig:
        return self.config if isinstance(self.config, ADMConfig) else ADMConfig.load(self.config)

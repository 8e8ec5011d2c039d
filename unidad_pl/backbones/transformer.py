"""What diffusers' transformers have in common behind the sigma contract: blocks, taps on them, prompts of any length.

A backbone of one more class is a subclass of :class:`TransformerNetwork` in a file of its own, see docs/backbones.md.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidad_pl.backbones.base import DiffusersNetwork, blank_text, checked_labels, checked_text
from unidad_pl.backbones.lora import ATTENTION
from unidad_pl.backbones.spec import UNetSpec, spec_of_scheduler
from unidad_pl.checks import check_choices, check_positive, check_whole
from unidad_pl.condition import Condition

Taps = Literal["quarters", "all"]
Run = Callable[[Tensor, Tensor, Condition], dict[str, Tensor]]
DEPTHS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers")
"""What configs call their numbers of blocks."""
SIZES = (
    "in_channels", "patch_size", "num_attention_heads", "attention_head_dim", "dim", "n_heads", "joint_attention_dim",
    "pooled_projection_dim", "cap_feat_dim", "num_embeds_ada_norm",
)  # fmt: skip
"""Those of their numbers that there is no network without."""
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The layers of a joint attention that read the prompt."""
CONTEXT_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")
QWEN3_TOKENS, QWEN3_TEMPLATE = 512, 24
"""What pipelines let Qwen3 read of a prompt and its chat template, and at most of the latter."""


class TransformerNetwork(DiffusersNetwork):
    """A diffusers transformer of latents. A subclass says what differs from class to class: its name, where its blocks
    are, sizes that its config has under names of its own, and :meth:`_call`.

        >>> from unidad_pl.backbones.dit import DiTNetwork
        >>> DiTNetwork.diffusers_class, DiTNetwork.takes_prompts
        ('DiTTransformer2DModel', False)

    Taps are outputs of blocks, ``block0`` the first: those of the image's tokens, as maps [B, D, h, w].

    Args:
        transformer: the network; its parameters live under ``transformer.`` in the state dict.
        spec: how to read it.
        side: of the images, in latents; None: what the model was made for.
        resolution: of the images, in pixels, where it is known.
        taps: which blocks have one: those after a ``quarters``, half and three quarters of the depth, or ``all``.
        guidance: the scale that a network distilled from a guided one takes as an input; None: its pipeline's.

    Raises:
        ValueError: a side that its patches do not divide, or a guidance scale it does not take.
    """

    diffusers_class: str
    """The name of its class."""

    older: tuple[str, ...] = ()
    """Names that it has in older files."""

    pipeline: str
    """The name of the pipeline's class that it is a part of."""

    vae = "AutoencoderKL"
    """The name of its VAE's class."""

    part, output_layer = "transformer", "proj_out"
    transformer: Any

    lists: tuple[str, ...] = ("transformer_blocks",)
    """The names of the lists that hold its blocks, in the order they are evaluated in."""

    adapted: tuple[str, ...] = (*ATTENTION, *FEED_FORWARD)
    """Ends of the names of the layers that adapters go into by default."""

    takes_prompts = True

    masks = False
    """Whether :meth:`_call` heeds the mask of a condition. Else images whose prompts have the same mask are evaluated
    together, without the tokens it leaves out."""

    usual_side = 128
    """Latents along each side of the images it was made for, where its config does not say so."""

    usual_guidance = 3.5
    """The guidance scale that its pipeline gives a network which takes one as an input."""

    vae_fold = 1
    """Latents of its VAE that are one of the network's, along each axis."""

    axes: tuple[str, int] | None = None
    """The entry of its config that divides a head's numbers among the axes of a token's place, and how many axes."""

    def __init__(
        self, transformer: nn.Module, spec: UNetSpec, side: int | None = None, taps: Taps = "quarters",
        guidance: float | None = None, resolution: int | None = None,
    ) -> None:  # fmt: skip
        check_choices(taps=(taps, Taps))
        check_whole(1, null=True, side=side)
        check_positive(guidance=guidance)
        super().__init__(transformer, spec)
        self._compute_tables()
        config = self.transformer.config
        channels, self.fold, self.width = self.sizes(config)
        side = side or config.get("sample_size") or self.usual_side
        if side % self.fold:
            raise ValueError(f"images of {self.diffusers_class} must have a side of {self.fold}n latents, got {side}")
        self.image_shape, self.resolution = (channels, side, side), resolution
        self.num_tokens, self.token_width, self.pooled = self.text_sizes(config)
        takes_guidance = bool(config.get("guidance_embeds"))
        if guidance is not None and not takes_guidance:
            raise ValueError(f"this {self.diffusers_class} takes no guidance scale as an input: leave guidance null")
        self.guidance = (guidance or self.usual_guidance) if takes_guidance else None
        self.distilled = takes_guidance
        self._check_axes(config)
        depth = sum(len(getattr(self.transformer, name)) for name in self.lists)
        check_whole(1, blocks=depth)
        quarters = {max(depth * part // 4, 1) - 1 for part in (1, 2, 3)}
        self.tapped = sorted(quarters) if taps == "quarters" else list(range(depth))

    def _check_axes(self, config: Mapping[str, Any]) -> None:
        if self.axes is None:
            return
        (name, count), heads = self.axes, config.get("num_attention_heads") or config["n_heads"]
        parts = config[name]
        if len(parts) != count or any(part % 2 or part < 2 for part in parts) or sum(parts) != self.width // heads:
            raise ValueError(f"{name} must be {count} even numbers, {self.width // heads} in all, got {list(parts)}")

    @classmethod
    def sizes(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Of a config: channels of its latents, latents of a token along each axis, numbers of a token."""
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return config["in_channels"], config["patch_size"], width

    @classmethod
    def text_sizes(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Of a config: tokens of a prompt as its pipeline encodes it, numbers of each, of the pooled embedding."""
        if cls.takes_prompts:
            raise NotImplementedError(f"{cls.__name__} takes prompts and must say of which sizes")
        return 0, 0, 0

    text_parts: Mapping[str, str] = {}
    """Parts of its pipeline that read prompts -> their classes in transformers."""

    dispensable: tuple[str, ...] = ()
    """Those of them that it can do without: a pipeline whose index says ``[null, null]`` of one has none."""

    chats = False
    """Whether its pipeline writes prompts into its tokenizer's chat template."""

    tokenizer, most_tokens = "tokenizer", 77
    """The name of the tokenizer that reads most of a prompt, and how many tokens of it."""

    @classmethod
    def encoded(cls, pipe: Any, prompt: str, device: torch.device | str) -> Condition:
        """A prompt by the ``encode_prompt`` of its pipeline ``pipe``, which has of its transformer the config alone."""
        raise NotImplementedError(f"{cls.__name__} takes prompts and must say how its pipeline encodes them")

    @classmethod
    def spec_of(cls, scheduler: Path, tokens: int) -> UNetSpec:
        """How to read a network with this scheduler config, for images of so many tokens."""
        return spec_of_scheduler(scheduler, tokens)

    @abstractmethod
    def _call(self, scaled: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """The class's own call, as its pipeline makes it.

        Args:
            scaled: [B, C, H, W] latents in the network's :attr:`dtype`, of unit variance at a flow's last time.
            time: [B] timesteps, 0 to :attr:`spec.train_timesteps <UNetSpec.train_timesteps>`.
            cond: condition of the B rows, its sizes checked.

        Returns:
            [B, C, H, W] what the parameterisation is of: the velocity ``eps - x0`` of a flow.
        """

    def _guidance_input(self, scaled: Tensor) -> Tensor | None:
        """The guidance scale of the B rows, for a network that takes it as an input."""
        return None if self.guidance is None else scaled.new_full((len(scaled),), self.guidance)

    def _compute_tables(self) -> None:
        """Buffers that no file of weights holds, such as positions, are as the class makes them."""
        lost = [
            (path, layer, name) for path, layer in self.transformer.named_modules()
            for name in layer._non_persistent_buffers_set
        ]  # fmt: skip
        if not lost or self.transformer.device.type == "meta":
            return
        config, place = self.transformer.config, next(self.transformer.parameters()).device
        shallow = {} if any(path.split(".")[0] in self.lists for path, _, _ in lost) else dict.fromkeys(DEPTHS, 1)
        fresh = type(self.transformer).from_config({**config, **{n: d for n, d in shallow.items() if n in config}})
        for path, layer, name in lost:
            layer._buffers[name] = fresh.get_submodule(path)._buffers[name].to(place)

    def _image_tokens(self, output: Any, count: int) -> Tensor:
        """The image's tokens [B, ``count``, D] in what a block answers; in most classes they come last."""
        return (output[-1] if isinstance(output, tuple) else output)[:, -count:]

    def check(self) -> None:
        """Goes once through the network on the meta device, where that costs nothing.

        Raises:
            ValueError: as of the base class; any error, of layers that do not fit each other.
        """
        super().check()
        # A copy: some keep tables on the device of their first pass.
        probe, cond = copy.deepcopy(self).to("meta"), self.blank_condition(1)
        assert cond is not None
        with torch.no_grad():
            probe.predict(torch.zeros(1, *self.image_shape).to("meta"), torch.ones(1).to("meta"), cond.to("meta"))

    # -- the contract --------------------------------------------------------------------------------------------

    def _output(self, scaled: Tensor, time: Tensor, cond: Condition | None) -> Tensor:
        return self._evaluate(lambda *rows: {"output": self._call(*rows)}, scaled, time, cond)["output"]

    def taps(
        self, x: Tensor, sigma: Tensor, cond: Condition | None = None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        self.depth_of(names)  # refuses unknown names
        wanted = [i for i in self.tapped if names is None or f"block{i}" in names]
        return self._evaluate(
            lambda *rows: self._tap(wanted, *rows), self.input_scale(sigma) * x, self.time(sigma), cond
        )

    @property
    def tap_channels(self) -> dict[str, int]:
        return {f"block{i}": self.width for i in self.tapped}

    def blank_condition(self, rows: int) -> Condition | None:
        if not self.takes_prompts:
            return super().blank_condition(rows)
        return blank_text(rows, self.num_tokens, self.token_width, self.pooled)

    def _evaluate(self, run: Run, scaled: Tensor, time: Tensor, cond: Condition | None) -> dict[str, Tensor]:
        """``run`` with a condition that fits; where the class has no mask, once for each mask there is."""
        scaled = scaled.to(self.dtype)
        if not self.takes_prompts:
            return run(scaled, time, checked_labels(cond, len(scaled)))
        cond = checked_text(cond, len(scaled), self.token_width, self.pooled)
        if cond.mask is None or self.masks:
            return run(scaled, time, cond)
        masks, kinds = cond.mask.unique(dim=0, return_inverse=True)
        groups = [(kinds == i).nonzero().flatten() for i in range(len(masks))]
        parts = []
        for rows, mask in zip(groups, masks, strict=True):
            some = cond[rows]
            assert some.tokens is not None
            parts.append(run(scaled[rows], time[rows], replace(some, tokens=some.tokens[:, mask], mask=None)))
        back = torch.cat(groups).argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def _tap(self, wanted: list[int], scaled: Tensor, time: Tensor, cond: Condition) -> dict[str, Tensor]:
        seen: dict[int, Any] = {}
        with self._first_blocks(wanted[-1] + 1) as blocks:
            hooks = [
                blocks[i].register_forward_hook(lambda _, __, output, i=i: seen.update({i: output})) for i in wanted
            ]
            try:
                self._call(scaled, time, cond)
            finally:
                for hook in hooks:
                    hook.remove()
        h, w = (size // self.fold for size in scaled.shape[2:])
        tokens = {i: self._image_tokens(seen[i], h * w) for i in wanted}
        return {f"block{i}": one.transpose(1, 2).unflatten(2, (h, w)) for i, one in tokens.items()}

    @contextmanager
    def _first_blocks(self, count: int) -> Iterator[list[nn.Module]]:
        """The network ends after its first ``count`` blocks inside."""
        lists: dict[str, Any] = {name: getattr(self.transformer, name) for name in self.lists}
        left, modules = count, self.transformer._modules
        for name, blocks in lists.items():
            modules[name] = blocks[:left]
            left = max(left - len(blocks), 0)
        try:
            yield [block for blocks in lists.values() for block in blocks]
        finally:
            modules.update(lists)


def packed(latents: Tensor, fold: int) -> Tensor:
    """Latents [B, C, H, W] -> tokens [B, H/fold * W/fold, C * fold^2], row by row."""
    return F.pixel_unshuffle(latents, fold).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, fold: int, shape: torch.Size) -> Tensor:
    """Tokens -> latents of ``shape`` [B, C, H, W], the inverse of :func:`packed`."""
    rows = tokens.transpose(1, 2).unflatten(2, (shape[2] // fold, shape[3] // fold))
    return F.pixel_shuffle(rows, fold)


def text_first(mask: Tensor | None, images: int) -> Tensor | None:
    """What an attention over the prompt's and then ``images`` image tokens takes, [B, 1, 1, L + images] bool."""
    return None if mask is None else F.pad(mask, (0, images), value=True)[:, None, None]

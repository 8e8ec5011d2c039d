"""The one contract all networks are used through: a sigma-denoiser ``D(x, sigma, cond) -> x0``.

``x = x0 + sigma * eps`` with ``x`` [B, C, H, W] and ``sigma`` [B]; images are in [-1, 1]. How a network was trained
(to predict eps, v, x0, EDM's mixture or a flow) is five coefficients, see :class:`Parameterization`; nothing else in
the package knows about it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from unidad_pl.arguments import given_arguments
from unidad_pl.condition import Condition

PredictionType = Literal["epsilon", "v_prediction", "sample", "edm", "flow"]


class Prediction(NamedTuple):
    """One network evaluation, seen as clean image and as noise; ``x = x0 + sigma * eps`` holds for the pair.

    Both are computed from the raw network output by their own formula: differences of two networks' ``eps`` stay
    exact at large sigma, where the same difference of ``x0`` drowns in rounding.
    """

    x0: Tensor
    """[B, C, H, W] the denoised image. Not clamped."""
    eps: Tensor
    """[B, C, H, W] the noise, unit variance where the model is good."""


@dataclass(frozen=True)
class Parameterization:
    """Coefficients between a network and its denoiser, of one prediction type, each [B, 1, 1, 1].

    ``x0 = c_skip * x + c_out * f`` and ``eps = eps_skip * x + eps_out * f`` with ``f = network(c_in * x, time)``.

        >>> how = Parameterization.of("epsilon", torch.tensor([2.0]), sigma_data=0.5)
        >>> float(how.c_skip), float(how.c_out)  # x0 = x - sigma * f
        (1.0, -2.0)
    """

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor
    eps_skip: Tensor
    eps_out: Tensor

    @classmethod
    def of(cls, kind: PredictionType, sigma: Tensor, sigma_data: float) -> Parameterization:
        """Coefficients at ``sigma`` [B]. ``sigma_data`` is used by ``edm`` only.

        ``epsilon``, ``v_prediction`` and ``sample`` are variance-preserving networks: they see ``c * x`` with
        ``c = 1/sqrt(1 + sigma^2)``. ``edm`` is Karras et al. 2022, table 1. ``flow`` networks (Lipman et al. 2023) see
        ``(1 - t) x0 + t eps`` with ``t = sigma / (1 + sigma)``, and predict ``eps - x0``.

        Raises:
            ValueError: an unknown ``kind``.
        """
        s = sigma.view(-1, 1, 1, 1)
        zero, one = torch.zeros_like(s), torch.ones_like(s)
        c = (1 + s**2).rsqrt()
        if kind == "epsilon":
            return cls(c, one, -s, zero, one)
        if kind == "v_prediction":  # v = c eps - (sigma c) x0 with the scaled input c x
            return cls(c, c**2, -s * c, s * c**2, c)
        if kind == "sample":
            return cls(c, zero, one, 1 / s, -1 / s)
        if kind == "edm":
            total = s**2 + sigma_data**2
            root = total.rsqrt()
            return cls(root, sigma_data**2 / total, s * sigma_data * root, s / total, -sigma_data * root)
        if kind == "flow":
            scale = 1 / (1 + s)
            return cls(scale, scale, -s * scale, scale, scale)
        raise ValueError(f"prediction must be one of {', '.join(get_args(PredictionType))}, got {kind!r}")

    def prediction(self, x: Tensor, f: Tensor) -> Prediction:
        """Both views of the network output ``f`` at the noisy input ``x`` (both [B, C, H, W])."""
        return Prediction(self.c_skip * x + self.c_out * f, self.eps_skip * x + self.eps_out * f)


class Denoiser(nn.Module, ABC):
    """Base class of all backbones. The exact denoiser of images that are standard normal noise:

        >>> class Noise(Denoiser):
        ...     image_shape, tap_channels = (1, 8, 8), {"in0": 1}
        ...     def predict(self, x, sigma, cond=None):
        ...         s2 = sigma.view(-1, 1, 1, 1) ** 2
        ...         return Prediction(x / (1 + s2), x * s2.sqrt() / (1 + s2))
        ...     def taps(self, x, sigma, cond=None, names=None):
        ...         return {"in0": x}
        >>> float(Noise()(torch.ones(1, 1, 8, 8), torch.tensor([1.0])).mean())
        0.5

    A subclass implements :meth:`predict` and :meth:`taps` and sets :attr:`image_shape`.
    """

    image_shape: tuple[int, int, int]
    """(C, H, W) of one image or latent."""

    num_classes: int | None = None
    """Number of classes of a class-conditional model, which needs ``cond.labels``; None: unconditional."""

    takes_prompts: bool = False
    """Whether it is a text-to-image model, whose :meth:`DenoiserSource.codec` embeds prompts."""

    distilled: bool = False
    """Whether its source says that it was distilled, for few steps or for guidance: a student, but no teacher."""

    shared_weights: frozenset[str] = frozenset()
    """Names in the state dict of weights that are never trained and that all copies of this network have in common: the
    base under adapters. They come from the network's source, not from checkpoints."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        """A network of its own, but for :attr:`shared_weights`."""
        memo.update({id(p): p for name, p in self.named_parameters() if name in self.shared_weights})
        # Ten tables of hooks in every module, nearly always empty, were most of the time of a copy.
        tables = (value for module in self.modules() for value in vars(module).values())
        memo.update({id(table): OrderedDict() for table in tables if type(table) is OrderedDict and not table})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @abstractmethod
    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        """Denoise ``x`` [B, C, H, W] at ``sigma`` [B] and return both views of the answer, at least float32."""

    @abstractmethod
    def taps(
        self, x: Tensor, sigma: Tensor, cond: Condition | None = None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Outputs of the encoder blocks and of the middle block; the decoder is not evaluated.

        Args:
            x: [B, C, H, W] noisy images.
            sigma: [B].
            cond: condition of the B rows.
            names: the outputs that are needed, out of :attr:`tap_channels`: nothing behind the deepest of them has to
                be evaluated, and others may be missing from the answer. None: all of them.

        Returns:
            name -> [B, C_name, H_name, W_name], in order of depth: ``in0``, ``in1``, ..., ``mid``.
        """

    @property
    @abstractmethod
    def tap_channels(self) -> dict[str, int]:
        """name -> channels, the same names and order as :meth:`taps`."""

    def depth_of(self, names: Collection[str] | None) -> int:
        """How many outputs, from the first on, :meth:`taps` needs for ``names``; all of them for None.

        Raises:
            ValueError: a name that is none of :attr:`tap_channels`.
        """
        known = list(self.tap_channels)
        if names is None:
            return len(known)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"taps {unknown} do not exist: this model has {', '.join(known)}")
        return 1 + max(known.index(name) for name in names)

    @property
    def native_sigmas(self) -> Tensor:
        """The sigmas the network was trained at, [T] ascending, for models with a discrete schedule.

        Raises:
            ValueError: the model has no table of its own.
        """
        raise ValueError(f"this {type(self).__name__} was trained on continuous noise levels: use noise_table: karras")

    def input_scale(self, sigma: Tensor) -> Tensor:
        """What the network multiplies ``x`` by at ``sigma`` [B] -> [B, 1, 1, 1]: as a variance-preserving one does."""
        return (1 + sigma.view(-1, 1, 1, 1) ** 2).rsqrt()

    free_steps: bool = True
    """Whether a few-step student's sigmas can be chosen; else they follow from their number alone."""

    def own_sigmas(self, num_steps: int) -> list[float] | None:
        """A few-step student's sigmas where none were chosen; None: log-linear ones, see StudentOptions."""
        return None

    def trained_sigmas(self, sigmas: Sequence[float]) -> list[float]:
        """What a few-step student uses for the chosen ``sigmas``: the same, or the nearest trained ones."""
        return list(sigmas)

    def init_noise_sigma(self, sigma: float) -> float:
        """Standard deviation of the noise that sampling starts from at the first ``sigma``."""
        return sigma

    def blank_condition(self, rows: int) -> Condition | None:
        """A condition that fits, of zeros: for questions about sizes and costs."""
        return None if self.num_classes is None else Condition(labels=torch.zeros(rows, dtype=torch.int64))

    def checkpoint_blocks(self) -> None:
        """From now on compute the blocks again in the backward pass instead of keeping what they computed.

        Raises:
            ValueError: the model cannot.
        """
        raise ValueError(f"{type(self).__name__} has no blocks to checkpoint: use checkpointing: steps, or none")

    def to_bfloat16(self) -> None:
        """Store and compute in bfloat16 what can be; the answer of :meth:`predict` stays float32.

        Raises:
            ValueError: the model cannot.
        """
        raise ValueError(f"{type(self).__name__} cannot be stored in bfloat16: use teacher_dtype: float32")

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Tensor:
        """``x0`` [B, C, H, W] of :meth:`predict`."""
        return self.predict(x, sigma, cond).x0


def guided(
    network: Denoiser, x: Tensor, sigma: Tensor, cond: Condition | None, unconditional: Condition | None, scale: float
) -> Prediction:
    """Classifier-free guidance ``u + scale (c - u)`` (Ho and Salimans 2022), both in one pass.

    Args:
        network: the denoiser.
        x: [B, C, H, W] noisy latents.
        sigma: [B].
        cond: condition of the B rows.
        unconditional: condition of the empty or negative prompt, 1 or B rows; needed above a scale of 1.
        scale: the guidance scale; 1 is no guidance and costs no second evaluation.

    Raises:
        ValueError: ``scale`` is below 1, or above it without both conditions.
    """
    if not 1 <= scale < math.inf:
        raise ValueError(f"a guidance scale below 1 weakens the prompt: give 1 (off) or more, got {scale}")
    if scale == 1:
        return network.predict(x, sigma, cond)
    if cond is None or unconditional is None:
        raise ValueError(f"a guidance scale of {scale} needs a condition and an unconditional one")
    both = Condition.cat([unconditional.expand(len(cond)), cond])
    answer = network.predict(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
    parts = (part.chunk(2) for part in answer)
    return Prediction(*(u + scale * (c - u) for u, c in parts))


def to_float(images: Tensor) -> Tensor:
    """uint8 [..., C, H, W] in 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float [..., C, H, W] in [-1, 1] (clamped) -> uint8, rounded; the inverse of :func:`to_float`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Codec:
    """Between pictures and what the networks work on. This one is for pixels: nothing to convert, no prompts."""

    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, R, R] in [-1, 1] -> images or latents [B, C, H, W] of the networks."""
        return images

    def decode(self, images: Tensor) -> Tensor:
        """Images or latents [B, C, H, W] -> pictures [B, 3, R, R], about in [-1, 1]."""
        return images

    def embed(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Condition:
        """Condition of ``prompts``: one row for each.

        Raises:
            ValueError: the model takes none.
        """
        raise ValueError(f"prompts were given ({prompts[0]!r}), but the source model is no text-to-image model")

    def reader(self) -> tuple[Any, int] | None:
        """The tokenizer that prompts go through, and how many of its tokens are read; None: there is none."""
        return None


class DenoiserSource(ABC):
    """A light description of a denoiser that a config can hold; nothing heavy happens before :meth:`build`.

    >>> from unidad_pl import NewUNet
    >>> NewUNet(resolution=16).build().image_shape
    (3, 16, 16)
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> DenoiserSource:
        source = super().__new__(cls)
        source.__dict__["_given"] = given_arguments(cls.__init__, args, kwargs)
        return source

    @abstractmethod
    def build(self) -> Denoiser:
        """Make the network (random or loaded), float32, in eval mode, on the current default device."""

    def codec(self) -> Codec:
        """What turns pictures and prompts into the network's images and conditions; light until it is used."""
        return Codec()

    def architecture(self) -> Denoiser:
        """The network without its weights, for questions about its size; no weight file is needed."""
        return self.build()


class GivenDenoiser(DenoiserSource):
    """A source of a network that was made in Python, or of a function that makes one; modules take these as they are.

        >>> from unidad_pl import NewUNet
        >>> GivenDenoiser(NewUNet(resolution=16).build).build().image_shape
        (3, 16, 16)

    Args:
        network: the network, or a function without arguments that makes one; either way it is copied.
    """

    def __init__(self, network: Denoiser | Callable[[], Denoiser]) -> None:
        self.network = network

    def build(self) -> Denoiser:
        network = self.network if isinstance(self.network, Denoiser) else self.network()
        if not isinstance(network, Denoiser):
            raise TypeError(f"the model must be a Denoiser, or a function that makes one; it made {network!r:.200}")
        return copy.deepcopy(network).eval()  # a function may return the same one again


def as_source(given: Any) -> DenoiserSource:
    """A source as it is; a :class:`Denoiser`, or a function that makes one, as a source.

    Raises:
        TypeError: something else.
    """
    if isinstance(given, DenoiserSource):
        return given
    if not callable(given) or isinstance(given, type):
        raise TypeError(
            f"a model is given as a source (such as PretrainedUNet(...)), a Denoiser, or a function that makes one, "
            f"got {given!r:.200}"
        )
    return GivenDenoiser(given)

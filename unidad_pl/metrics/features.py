"""Feature extractors: the one interface through which every metric looks at images.

A feature module maps images [N, 3, H, W] float in [-1, 1] to features [N, D] float and has a ``name`` that goes into
the records, because values of different extractors can never be compared. ``load`` reads the network; it is called
before training begins, so that missing weights end a run in its first second and not after hours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unidad_pl.checks import check_arguments
from unidad_pl.files import expanded
from unidad_pl.metrics.weights import check_numbers, missing_weights, only_weights, reason_of

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"

Net = Literal["vgg", "alex", "squeeze"]

CPU_ROWS = 10
"""Most images that a feature network sees at a time on a CPU."""


class FeatureModule(nn.Module):
    """Base of the extractors here. Any ``nn.Module`` with the same ``forward`` will do instead of a subclass.

        >>> class MeanColour(FeatureModule):
        ...     name = "mean-colour"
        ...     def forward(self, images):
        ...         return images.mean((2, 3))
        >>> MeanColour()(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 3])

    Attributes:
        name: identifies extractor and weights.

    A class with a method ``fingerprint``, which gives a tuple of all that its features follow from besides its code
    (settings, weights), has its features of reference images kept on disk: see :mod:`unidad_pl.metrics.cache`.
    """

    name: str = "features"

    def load(self) -> None:
        """Read the network, once; by default there is none.

        Raises:
            RuntimeError: its weights cannot be found; says which, and what to do.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] float in [-1, 1] -> features [N, D] float."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> FeatureModule:
        """Extractors never train: dropout or batch statistics would change the metric."""
        return super().train(False)


def _home(path: str | None) -> str | None:
    """``path`` with ``~`` as the home folder."""
    return None if path is None else str(expanded(path))


class InceptionFeatures(FeatureModule):
    """The 2048 pooled features of the Inception network that FID is defined with (torch-fidelity's port).

        >>> InceptionFeatures()(torch.zeros(2, 3, 64, 64)).shape  # doctest: +SKIP
        torch.Size([2, 2048])

    It rounds images to uint8 and resizes them to 299 pixels, as TensorFlow 1 did.

    Args:
        weights_path: the weight file. Default: torch's hub folder, downloaded (96 MB) if it is not there.
    """

    name = "inception-v3-compat-2048"

    def __init__(self, weights_path: str | None = None) -> None:
        super().__init__()
        self.weights_path = _home(weights_path)
        self.network: nn.Module | None = None

    def load(self) -> None:
        if self.network is not None:
            return
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            # Its layers are initialised before the weights are read.
            with torch.random.fork_rng(devices=[]), only_weights():
                network = FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048"], feature_extractor_weights_path=self.weights_path, verbose=False
                )
            check_numbers(network.state_dict())
            self.network = network
        except Exception as error:
            raise missing_weights(
                "InceptionFeatures", INCEPTION_FILE, "96 MB", INCEPTION_URL, self.weights_path, error
            ) from error

    def fingerprint(self) -> tuple[object, ...]:
        self.load()
        return (self,)

    def forward(self, images: Tensor) -> Tensor:
        if self.network is None:
            self.load()
            self.to(images.device)
        assert self.network is not None
        rounded = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = self.network(rounded)[0]
        return features


@dataclass(frozen=True)
class Backbone:
    """A torchvision classifier that LPIPS is built on.

    Attributes:
        builder: the function in ``torchvision.models`` that makes it.
        file: its ImageNet weights.
        size: how large that file is.
        taps: positions in its ``features`` whose outputs LPIPS compares.
    """

    builder: str
    file: str
    size: str
    taps: tuple[int, ...]

    @property
    def url(self) -> str:
        return f"https://download.pytorch.org/models/{self.file}"


BACKBONES: dict[Net, Backbone] = {
    "vgg": Backbone("vgg16", "vgg16-397923af.pth", "528 MB", (3, 8, 15, 22, 29)),
    "alex": Backbone("alexnet", "alexnet-owt-7be5be79.pth", "233 MB", (1, 4, 7, 9, 11)),
    "squeeze": Backbone("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth", "5 MB", (1, 4, 7, 9, 10, 11, 12)),
}


class LPIPSFeatures(FeatureModule):
    """The map phi with ``LPIPS(x, y) = |phi(x) - phi(y)|^2`` (Zhang et al. 2018, version 0.1).

        >>> phi = LPIPSFeatures("squeeze", pnet_rand=True)
        >>> x, y = torch.rand(2, 4, 3, 32, 32) * 2 - 1
        >>> (phi(x) - phi(y)).square().sum(1).shape  # four distances
        torch.Size([4])

    LPIPS is a weighted sum of squared differences of unit-normalised feature maps with weights >= 0, so it is a squared
    Euclidean distance: ``phi = concat_l sqrt(w_l / (H_l W_l)) n_l``. One pass per image replaces two per pair. The
    linear weights come with the ``lpips`` package, the backbone from torchvision.

    Args:
        net: ``vgg`` (what intra-LPIPS is defined with), ``alex`` or ``squeeze``.
        weights_path: torchvision's file of the backbone. Default: torch's hub folder, downloaded if it is not there.
        pnet_rand: a random backbone, the same everywhere; no download. For tests: values mean nothing.

    Raises:
        ValueError: an unknown ``net``, or a weight file for a random backbone.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: Net = "vgg", weights_path: str | None = None, pnet_rand: bool = False) -> None:
        check_arguments(LPIPSFeatures.__init__, {"pnet_rand": pnet_rand})
        super().__init__()
        if net not in BACKBONES:
            raise ValueError(f"net must be one of {', '.join(BACKBONES)}, got {net!r}")
        if pnet_rand and weights_path is not None:
            raise ValueError(f"pnet_rand=True uses no weights: leave weights_path out (got {weights_path!r})")
        self.net, self.weights_path, self.pnet_rand = net, _home(weights_path), pnet_rand
        self.name = f"lpips-{net}-v0.1" + ("-random" if pnet_rand else "")
        self.backbone: nn.Sequential | None = None
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def load(self) -> None:
        if self.backbone is not None:
            return
        with torch.inference_mode(False):  # loaded during validation, it can still pass gradients to images later
            weights, backbone = self._linear_weights(), self._build_backbone()
            for layer, weight in enumerate(weights):
                self.register_buffer(f"weight{layer}", weight.to(self.shift.device))
            backbone = backbone.requires_grad_(False).to(self.shift.device).eval()
            self.backbone = backbone.to(memory_format=torch.channels_last)  # SqueezeNet in 3/4 of the time on a CPU

    def _linear_weights(self) -> list[Tensor]:
        """The calibrated layers of version 0.1, each [1, C, 1, 1] and >= 0, read without importing lpips (slow)."""
        spec = find_spec("lpips")
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError("LPIPSFeatures needs the linear weights of the package lpips: pip install lpips")
        path = Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / f"{self.net}.pth"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            weights = [state[f"lin{layer}.model.1.weight"] for layer in range(len(BACKBONES[self.net].taps))]
        except Exception as error:
            raise RuntimeError(f"{path} cannot be read ({reason_of(error)}): reinstall lpips") from error
        if not all(bool((weight >= 0).all()) for weight in weights):
            raise RuntimeError(f"{path} holds negative weights: this is not LPIPS v0.1, reinstall lpips")
        return weights

    def _build_backbone(self) -> nn.Sequential:
        from torchvision import models

        known = BACKBONES[self.net]
        build = getattr(models, known.builder)
        depth = known.taps[-1] + 1
        if self.pnet_rand:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network: nn.Sequential = build(weights=None).features[:depth]
            return network
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # initialising meta tensors does nothing, and says so
            network = build(weights=None).features[:depth]
        read: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
        try:
            if self.weights_path is None:
                state = torch.hub.load_state_dict_from_url(known.url, progress=False, check_hash=True, **read)
            else:
                state = torch.load(self.weights_path, **read)
            wanted = {key: state[f"features.{key}"] for key in network.state_dict()}
            check_numbers(wanted)
            network.load_state_dict(wanted, assign=True)
            network.float()
        except Exception as error:
            raise missing_weights(
                "LPIPSFeatures", known.file, known.size, known.url, self.weights_path, error
            ) from error
        return network

    def fingerprint(self) -> tuple[object, ...]:
        self.load()
        return self.net, self

    def forward(self, images: Tensor) -> Tensor:
        if self.backbone is None:
            self.load()
            self.to(images.device)
        assert self.backbone is not None
        taps = BACKBONES[self.net].taps
        parts: list[Tensor] = []
        with torch.autocast(images.device.type, enabled=False):
            x = ((images.float() - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
            for position, layer in enumerate(self.backbone):
                x = layer(x)
                if position in taps:
                    unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                    weight: Tensor = getattr(self, f"weight{len(parts)}")
                    parts.append((unit * (weight / (x.shape[2] * x.shape[3])).sqrt()).flatten(1))
        return torch.cat(parts, 1)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` is in eval mode in this block; afterwards every part of it is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def check_network(**networks: object) -> None:
    """Refuse what is no network.

    Raises:
        TypeError: names the argument and what it got.
    """
    for name, network in networks.items():
        if not isinstance(network, nn.Module):
            got = f"the class {network.__name__}: call it" if isinstance(network, type) else repr(network)
            raise TypeError(
                f"{name} must be a torch.nn.Module that maps [N, 3, H, W] in [-1, 1] to features [N, D], got {got}"
            )


def float_images(images: Tensor, what: str) -> Tensor:
    """Images [N, 3, H, W] as float32 in [-1, 1], give or take some rounding.

        >>> float_images(torch.zeros(2, 1, 8, 8, dtype=torch.float16), "samples").shape
        torch.Size([2, 3, 8, 8])

    Args:
        images: floats of any precision, with 3 channels, or 1 that is repeated.
        what: how errors call them.

    Raises:
        ValueError: anything else; says what they are.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
        got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{what} must be a tensor [N, 3, H, W], got {got}")
    if not images.is_floating_point():
        raise ValueError(f"{what} must be floats in [-1, 1], got {images.dtype}")
    images = images.float().expand(-1, 3, -1, -1)
    if not images.numel():
        return images
    low, high = (float(value) for value in images.aminmax())
    if math.isnan(low) or math.isnan(high):
        broken = int(images.isnan().flatten(1).any(1).sum())
        raise ValueError(f"{what} hold NaN in {broken} of {len(images)} images: whatever made them has diverged")
    if low < -1.01 or high > 1.01:
        raise ValueError(f"{what} must be floats in [-1, 1], got values from {low:.4g} to {high:.4g}")
    return images


def extract(features: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Features [N, D] float32 of images [N, 3, H, W] in [-1, 1], ``batch_size`` at a time; eval mode, no gradient.

    On a CPU all parts have one size, at most :data:`CPU_ROWS`, and the last one is filled up with copies: most kernels
    are chosen by the size of a batch, and features would depend on how many ranks share the images.

    Raises:
        ValueError: the network returns anything but finite numbers [N, D].
    """
    rows = min(batch_size, CPU_ROWS) if images.device.type == "cpu" else batch_size
    missing = -len(images) % rows if images.device.type == "cpu" and len(images) else 0
    filled = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
    with torch.no_grad(), evaluating(features):
        parts = [(features(part), len(part)) for part in filled.split(rows)]
    name = getattr(features, "name", type(features).__name__)
    for found, wanted in parts:
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != wanted:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{name} must return features [N, D] of {wanted} images, got {got}")
    every = torch.cat([found.float() for found, _ in parts])[: len(images)]
    if every.numel() and not all(math.isfinite(value) for value in every.aminmax()):  # no temporaries of that size
        raise ValueError(f"{name} returned NaN or infinite features: the images or the network are broken")
    return every

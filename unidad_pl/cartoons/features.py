"""The judge of the cartoon world: a small network that reads the factors of an image, and features for metrics.

Frechet distances, diversity and attribute shares normally need Inception or VGG weights. For the embedded world this
network of under 0.8 MB takes their place: it was trained to name every factor of a cartoon (species, glasses, hair,
pose, ...) and how noisy and blurred the image is, so images that differ in any of these differ in its features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from unidad_pl.checks import check_at_least, check_choices, check_whole
from unidad_pl.files import expanded, reading

Layer = Literal["factors", "pooled"]
ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUILTIN = "builtin:"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
REBUILD = "unidad fit --config configs/assets/features.yaml"
INPUT_SIZE = 32  # pixels; other sizes are resampled to it
_GROUPS = 8  # of every GroupNorm


@dataclass(frozen=True)
class FactorOutput:
    """What :class:`FactorNetwork` sees in N images.

    Attributes:
        features: [N, D] penultimate activations.
        logits: categorical factor -> [N, number of its values].
        values: continuous factor -> [N], its range mapped to [-1, 1].
    """

    features: Tensor
    logits: dict[str, Tensor]
    values: dict[str, Tensor]


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class FactorNetwork(nn.Module):
    """Images -> features -> one head per categorical factor and one for all continuous ones.

    No layer behaves differently in training and evaluation, and every image is judged independently of its batch.

    Args:
        categories: categorical factor -> names of its values, at least two.
        ranges: continuous factor -> [low, high].
        channels: width of each level; every level after the first halves the side. Multiples of 8, four or fewer
            halvings.
        features: D, the number of features.

    Raises:
        ValueError: a factor with fewer than two values, an empty range, or widths that cannot be built.
    """

    def __init__(
        self,
        categories: Mapping[str, Sequence[str]],
        ranges: Mapping[str, Sequence[float]],
        channels: Sequence[int] = (16, 40, 80, 120),
        features: int = 96,
    ) -> None:
        super().__init__()
        self.categories = {name: list(values) for name, values in categories.items()}
        self.ranges = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        self.channels, self.num_features = tuple(channels), features
        for name, values in self.categories.items():
            if len(values) < 2:
                raise ValueError(f"categorical factor {name!r} needs at least two values, got {values}")
        for name, (low, high) in self.ranges.items():
            if low >= high:
                raise ValueError(f"the range of {name!r} must go up, got [{low}, {high}]")
        if not 1 <= len(self.channels) <= 5 or any(c < _GROUPS or c % _GROUPS for c in self.channels):
            raise ValueError(f"channels must be 1 to 5 multiples of {_GROUPS}, got {self.channels}")
        check_whole(1, 65536, null=True, features=features)
        check_at_least(1, 65536, **{f"channels[{i}]": width for i, width in enumerate(self.channels)})
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, padding=1)]
        for narrow, wide in pairwise(channels):
            layers += [nn.GroupNorm(_GROUPS, narrow), nn.SiLU(), nn.Conv2d(narrow, wide, 3, 2, 1), _Residual(wide)]
        layers += [nn.GroupNorm(_GROUPS, channels[-1]), nn.SiLU(), nn.Conv2d(channels[-1], 32, 1)]
        self.trunk = nn.Sequential(*layers)
        # Flattened, not averaged over the image: pose is where things are.
        side = INPUT_SIZE // 2 ** (len(channels) - 1)
        self.project = nn.Linear(32 * side * side, features)
        # The norm gives features a scale of order 1, whatever the training made of the weights.
        self.norm = nn.LayerNorm(features)
        self.heads = nn.ModuleDict({name: nn.Linear(features, len(v)) for name, v in self.categories.items()})
        self.regression = nn.Linear(features, len(self.ranges))
        self.register_buffer("pooled_mean", torch.zeros(sum(channels[1:])))
        self.register_buffer("pooled_std", torch.ones(sum(channels[1:])))
        self.pooled_mean: Tensor
        self.pooled_std: Tensor

    def features(self, images: Tensor) -> Tensor:
        """Features [N, D] of ``images`` [N, 3, H, W], float in [-1, 1] (clamped, as a picture file would).

        Raises:
            ValueError: not RGB images, or integers.
        """
        x = self.trunk(self._input(images))
        return F.silu(self.norm(self.project(x.flatten(1))))

    def pooled(self, images: Tensor) -> Tensor:
        """Activations averaged over the image, of every level below the first: [N, sum(channels[1:])].

        Each has mean 0 and standard deviation 1 over the renders that :meth:`standardise` saw. No layer behind them
        scales an image's features to the same length, so an image twice as bad is about twice as far away.
        See :meth:`features` for the input.
        """
        return (self._pool(images) - self.pooled_mean) / self.pooled_std

    @torch.no_grad()
    def standardise(self, images: Tensor) -> None:
        """Make :meth:`pooled` standardised over ``images``, as in :meth:`features`; at least two."""
        pooled = torch.cat([self._pool(part) for part in images.split(250)])
        self.pooled_mean.copy_(pooled.mean(0))
        self.pooled_std.copy_(pooled.std(0).clamp_min(1e-3))

    def _pool(self, images: Tensor) -> Tensor:
        x, levels = self._input(images), []
        for layer in self.trunk:
            x = layer(x)
            if isinstance(layer, _Residual):
                levels.append(x.mean((2, 3)))
        return torch.cat(levels, 1)

    def _input(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            seen = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"expected float images [N, 3, H, W] in [-1, 1], got {seen}")
        x = images.to(self.project.weight.dtype)
        if x.shape[-2:] != (INPUT_SIZE, INPUT_SIZE):
            x = F.interpolate(x, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True)
        return x.clamp(-1, 1).contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> FactorOutput:
        """See :meth:`features` for the input."""
        features = self.features(images)
        logits = {name: self.heads[name](features) for name in self.categories}
        values = dict(zip(self.ranges, self.regression(features).unbind(1), strict=True))
        return FactorOutput(features, logits, values)

    def normalise(self, name: str, value: Tensor) -> Tensor:
        """The range of factor ``name`` -> [-1, 1]."""
        low, high = self.ranges[name]
        return (value - low) * (2 / (high - low)) - 1

    def denormalise(self, name: str, value: Tensor) -> Tensor:
        """[-1, 1] -> the range of factor ``name``; the inverse of :meth:`normalise`."""
        low, high = self.ranges[name]
        return (value + 1) * ((high - low) / 2) + low

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors`` (weights as ``dtype``) into ``folder``, made if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "categories": self.categories, "ranges": self.ranges, "channels": self.channels,
            "features": self.num_features,
        }  # fmt: skip
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in self.state_dict().items()}
        (folder / WEIGHTS_FILE).write_bytes(save(weights))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FactorNetwork:
        """The network written by :meth:`save_pretrained`, in float32 on the CPU.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the config or the weights hold too little, too much, or something of another shape.
        """
        folder = Path(folder)
        config = read_config(folder)
        rebuild = f"rebuild it with: {REBUILD}"
        with reading(folder / CONFIG_FILE, "config of a FactorNetwork", rebuild), torch.random.fork_rng(devices=[]):
            network = cls(**config)  # layers are initialised before the weights are read
        with reading(path := _existing(folder, WEIGHTS_FILE), "safetensors file", rebuild):
            weights, own = load_file(path), network.state_dict()
            if broken := [name for name, value in weights.items() if not bool(value.isfinite().all())]:
                raise ValueError(f"{broken[0]} holds NaN or infinite values")
        _same_names(set(own), set(weights), folder / WEIGHTS_FILE)
        for name, tensor in weights.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{folder / WEIGHTS_FILE}: {name!r} has shape {tuple(tensor.shape)}, but {CONFIG_FILE} describes "
                    f"{tuple(own[name].shape)}: the two files do not belong together. Rebuild with: {REBUILD}"
                )
        network.load_state_dict(weights)
        return network


def _existing(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"no {name} in folder {folder}: check the path, or rebuild it with: {REBUILD}")
    return folder / name


def _same_names(wanted: set[str], seen: set[str], where: Path) -> None:
    if wanted != seen:
        raise ValueError(
            f"{where}: missing {sorted(wanted - seen)}, unknown {sorted(seen - wanted)}. Rebuild it with: {REBUILD}"
        )


def read_config(folder: str | Path) -> dict[str, Any]:
    """The arguments of the :class:`FactorNetwork` saved in ``folder``, without its weights.

    Raises:
        FileNotFoundError: no such config.
        ValueError: it is not JSON of exactly these arguments.
    """
    path = _existing(Path(folder), CONFIG_FILE)
    with reading(path, "config of a FactorNetwork", f"rebuild it with: {REBUILD}"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected a JSON object, got {type(config).__name__}")
    _same_names({"categories", "ranges", "channels", "features"}, set(config), path)
    return config


class CartoonFeatures(nn.Module):
    """The feature extractor of the cartoon world, for any metric that wants features or attributes.

        >>> from unidad_pl.cartoons.world import render
        >>> judge, images = CartoonFeatures(), render(range(3), "sunglasses")
        >>> judge(images).shape, CartoonFeatures(layer="pooled")(images).shape
        (torch.Size([3, 96]), torch.Size([3, 240]))
        >>> judge.predict(images)["glasses"], judge.categories["glasses"]
        (tensor([1, 1, 1]), ['none', 'dark'])

    Light until used: the network is read from disk at the first call, and follows the images' device. It is frozen,
    float32, and part of no checkpoint: whoever holds this extractor saves and loads the same with and without it read.

    Args:
        path: folder written by :meth:`FactorNetwork.save_pretrained`, or ``builtin:NAME`` for one that ships with the
            package.
        layer: ``factors``, what the factors are read from, to compare two images (as LPIPS does); or ``pooled``, the
            activations of all levels averaged over the image, to compare two sets of images (as Inception's are).

    Raises:
        ValueError: another ``layer``.
    """

    def __init__(self, path: str = "builtin:cartoon_features", layer: Layer = "factors") -> None:
        super().__init__()
        check_choices(layer=(layer, Layer))
        self.path, self.layer = path, layer
        self.name = "cartoon_features" + ("-pooled" if layer == "pooled" else "")
        self._loaded: list[FactorNetwork] = []  # in a list, so that torch does not register it

    @property
    def folder(self) -> Path:
        """Where the network lies."""
        return ASSETS / self.path.removeprefix(BUILTIN) if self.path.startswith(BUILTIN) else expanded(self.path)

    @property
    def categories(self) -> dict[str, list[str]]:
        """Categorical factor -> names of its values. Reads the config only."""
        return read_config(self.folder)["categories"]

    @property
    def num_features(self) -> int:
        """D. Reads the config only."""
        config = read_config(self.folder)
        return int(config["features"]) if self.layer == "factors" else sum(config["channels"][1:])

    def load(self) -> FactorNetwork:
        """The network, read from disk once; errors as in :meth:`FactorNetwork.from_pretrained`."""
        if not self._loaded:
            with torch.inference_mode(False):  # first used at validation, it can still pass gradients later
                self._loaded.append(FactorNetwork.from_pretrained(self.folder).requires_grad_(False).eval())
        return self._loaded[0]

    def fingerprint(self) -> tuple[object, ...]:
        """What the features follow from, besides this code."""
        network = self.load()
        return self.layer, network.channels, network

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, D] float32 of ``images`` [N, 3, H, W] in [-1, 1]; gradients pass to the images."""
        with torch.autocast(images.device.type, enabled=False):
            network = self.load().to(images.device)
            return network.features(images) if self.layer == "factors" else network.pooled(images)

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """All factors: name -> [N, values], 1 at the likeliest value of a category, or [N], a range as [-1, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            output = self.load().to(images.device)(images)
        seen = {name: F.one_hot(one.argmax(1), one.shape[1]).float() for name, one in output.logits.items()}
        return seen | output.values

    @torch.no_grad()
    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """The likeliest value of every categorical factor: name -> [N] int64, positions in :attr:`categories`."""
        with torch.autocast(images.device.type, enabled=False):
            logits = self.load().to(images.device)(images).logits
        return {name: values.argmax(1) for name, values in logits.items()}

"""CLIP and DINO encoders of pictures and texts, through transformers.

Every picture, photo or sample, is prepared in one way: its shorter side is resized to the encoder's size (bicubic,
antialiased), its centre cut out, and the encoder's own mean and deviation applied. The weights are the ones asked for,
or there is an error: never others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidad_pl.checks import check_whole
from unidad_pl.files import expanded, mistaken
from unidad_pl.metrics.features import FeatureModule
from unidad_pl.metrics.weights import check_numbers, reason_of

CLIP = "openai/clip-vit-base-patch32"
DINO = "facebook/dino-vits16"
DINOV2 = "facebook/dinov2-large"
CLIP_336 = "openai/clip-vit-large-patch14-336"
MOST_LAYERS, MOST = 200, 10**6
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def to_square(images: Tensor, size: int) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] -> [N, 3, size, size]: the shorter side resized, the centre cut out."""
    height, width = images.shape[2:]
    shape = (height * size // min(height, width), width * size // min(height, width))
    if shape != (height, width):
        images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return images[:, :, top : top + size, left : left + size]


def load_part(owner: str, class_name: str, path: str, kind: str, **options: Any) -> nn.Module:
    """A transformers model with every one of its weights from ``path``, a hub id or a folder; frozen, float32.

    Args:
        owner: whose weights they are, for errors.
        class_name: of the transformers class.
        path: hub id or folder; nothing is downloaded for a folder, nor with ``HF_HUB_OFFLINE`` set.
        kind: the ``model_type`` its config.json must name.
        options: for ``from_pretrained``.

    Raises:
        RuntimeError: transformers is missing, or the weights are: says which, and where to get them.
        ValueError: ``path`` holds another kind of model, or not all weights.
    """
    if find_spec("transformers") is None:
        raise RuntimeError(f"{owner} needs transformers: pip install 'unidad_pl[sdp]'")
    import transformers

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise missing(owner, path, FileNotFoundError("the folder has no config.json"))
    offline: dict[str, Any] = {"local_files_only": stays_offline(path)}
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, **offline)
        check_sizes(config.to_dict())
    except Exception as error:
        raise missing(owner, path, error) from error
    if config.model_type != kind:
        raise ValueError(f"{owner} needs a {kind!r} model, but {path!r} holds a {config.model_type!r} model")
    try:
        with torch.random.fork_rng(devices=[]):
            network, report = getattr(transformers, class_name).from_pretrained(
                path, output_loading_info=True, **offline, **options
            )
    except Exception as error:
        raise missing(owner, path, error) from error
    if absent := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise ValueError(f"{owner}: the weights in {path!r} are not complete: {sorted(map(str, absent))[:3]} ...")
    try:
        check_numbers(network.state_dict())
    except ValueError as error:
        raise ValueError(f"{owner}: the weights in {path!r} cannot be used: {error}") from error
    part: nn.Module = network.float().requires_grad_(False).eval()
    return part


def check_sizes(config: Any, name: str = "config") -> None:
    """Refuse numbers that no encoder has; building it would not end.

    Raises:
        ValueError: names the first.
    """
    for key, value in config.items() if isinstance(config, dict) else ():
        check_sizes(value, key)
    most = MOST_LAYERS if name == "num_hidden_layers" else MOST
    if isinstance(config, (int, float)) and not abs(config) <= most:
        raise ValueError(f"its config says {name} {config}, more than {most}")


def stays_offline(path: str) -> bool:
    """Whether ``path`` must be found without asking the hub."""
    return Path(path).is_dir() or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def missing(owner: str, path: str, error: Exception) -> RuntimeError:
    """The error to raise when ``path`` is not there."""
    files = sorted(Path(path).glob("*")) if Path(path).is_dir() else []
    found = next((reason for file in files if (reason := mistaken(file))), None)
    if files and not isinstance(error, FileNotFoundError):
        return RuntimeError(
            f"{owner} needs the weights {path!r}, but that folder cannot be read ({found or reason_of(error)}): get "
            f"all of its files again, as 'hf download OWNER/NAME --local-dir FOLDER' does; then pass it as path=FOLDER."
        )
    first = str(error).strip().partition("\n")[0]
    return RuntimeError(
        f"{owner} needs the weights {path!r}, which are in no folder of that name, not in the Hugging Face cache, and "
        f"could not be downloaded ({first}). On a machine with a network: hf download {path} --local-dir FOLDER; then "
        f"pass the folder as path=FOLDER."
    )


class _Encoder(FeatureModule):
    """A transformers network, read when it is first needed; ``mean`` and ``std`` are those of its pictures."""

    mean: Sequence[float]
    std: Sequence[float]
    side: int | None = None  # of the pictures, where it is not the config's

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.name = str(expanded(path)), path
        self.register_buffer("place", torch.zeros(()), persistent=False)
        self.place: Tensor
        self.network: Any = None

    def load(self) -> None:
        if self.network is None:
            with torch.inference_mode(False):
                self.network = self._load().to(self.place.device)

    def _facts(self) -> tuple[object, ...]:
        """What embeddings follow from besides the code."""
        self.load()
        return self.network.config.to_json_string(use_diff=False), self.network

    def _load(self) -> nn.Module:
        raise NotImplementedError

    def _embed(self, pictures: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        self.load()
        config = self.network.config
        size = self.side or getattr(config, "vision_config", config).image_size
        unit = (to_square(images.float().to(self.place.device), size) + 1) / 2
        pictures = (unit - unit.new_tensor(self.mean).view(1, 3, 1, 1)) / unit.new_tensor(self.std).view(1, 3, 1, 1)
        with torch.autocast(pictures.device.type, enabled=False):
            return self._embed(pictures)


class CLIPImages(_Encoder):
    """CLIP's picture embeddings [N, D], not normalised.

        >>> CLIPImages()(torch.zeros(2, 3, 64, 64)).shape  # doctest: +SKIP
        torch.Size([2, 512])

    Args:
        path: hub id or folder of a ``CLIPModel``.
    """

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, path: str = CLIP) -> None:
        super().__init__(path)

    def fingerprint(self) -> tuple[object, ...]:
        return self._facts()

    def _load(self) -> nn.Module:
        network: Any = load_part("CLIPImages", "CLIPModel", self.path, "clip")
        del network.text_model, network.text_projection
        return network

    def _embed(self, pictures: Tensor) -> Tensor:
        return self.network.visual_projection(self.network.vision_model(pictures).pooler_output)


class CLIPTexts(_Encoder):
    """CLIP's text embeddings [N, D], not normalised.

        >>> CLIPTexts()(["a photo of a dog", "a cat"]).shape  # doctest: +SKIP
        torch.Size([2, 512])

    Args:
        path: hub id or folder of a ``CLIPModel`` and its tokenizer.
    """

    def __init__(self, path: str = CLIP) -> None:
        super().__init__(path)
        self.tokenizer: Any = None

    def _load(self) -> nn.Module:
        network: Any = load_part("CLIPTexts", "CLIPModel", self.path, "clip")
        del network.vision_model, network.visual_projection
        from transformers import CLIPTokenizer

        if wrong := [reason for name in TOKENIZER if (reason := mistaken(Path(self.path) / name))]:
            raise missing("CLIPTexts (its tokenizer)", self.path, ValueError(wrong[0]))
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(self.path, local_files_only=stays_offline(self.path))
            last = max(self.tokenizer.get_vocab().values())
            if last >= network.config.text_config.vocab_size:
                raise ValueError(f"it numbers tokens up to {last}, the model has fewer")
        except Exception as error:  # a folder with half a vocabulary, or none
            raise missing("CLIPTexts (its tokenizer)", self.path, error) from error
        if len(self.tokenizer) <= len(self.tokenizer.all_special_ids):  # which may also give one that knows no word
            found = FileNotFoundError("there is no vocabulary: vocab.json and merges.txt")
            raise missing("CLIPTexts (its tokenizer)", self.path, found)
        return network

    def forward(self, texts: Sequence[str]) -> Tensor:  # type: ignore[override]
        """N texts -> [N, D].

        Raises:
            ValueError: a text with more tokens than CLIP reads.
        """
        self.load()
        most = self.network.config.text_config.max_position_embeddings
        for text in texts:
            if (tokens := len(self.tokenizer(text).input_ids)) > most:
                raise ValueError(f"the text {text!r} has {tokens} tokens, CLIP reads {most}: make it shorter")
        given = self.tokenizer(list(texts), padding=True, return_tensors="pt").to(self.place.device)
        with torch.no_grad(), torch.autocast(self.place.device.type, enabled=False):
            found: Tensor = self.network.text_projection(self.network.text_model(**given).pooler_output)
        return found


class DINOImages(_Encoder):
    """The class token of DINO's ViT, [N, D], as in DreamBooth's DINO score (version 1, ViT-S/16).

        >>> DINOImages()(torch.zeros(2, 3, 64, 64)).shape  # doctest: +SKIP
        torch.Size([2, 384])

    Args:
        path: hub id or folder of a ``ViTModel``.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's

    def __init__(self, path: str = DINO) -> None:
        super().__init__(path)

    def fingerprint(self) -> tuple[object, ...]:
        return self._facts()

    def _load(self) -> nn.Module:
        return load_part("DINOImages", "ViTModel", self.path, "vit", add_pooling_layer=False)

    def _embed(self, pictures: Tensor) -> Tensor:
        return self.network(pixel_values=pictures).last_hidden_state[:, 0]


class DINOv2Images(_Encoder):
    """The class token of DINOv2's ViT, behind its last norm, [N, D]: the features of FD-DINOv2 (Stein et al. 2023).

        >>> DINOv2Images()(torch.zeros(2, 3, 64, 64)).shape  # doctest: +SKIP
        torch.Size([2, 1024])

    Pictures are 224 pixels wide whatever size the network was last trained at.

    Args:
        path: hub id or folder of a ``Dinov2Model``; FD-DINOv2 is defined with ViT-L/14.
        side: width and height of its pictures, in pixels.

    Raises:
        ValueError: ``side`` below 1.
    """

    mean, std = DINOImages.mean, DINOImages.std

    def __init__(self, path: str = DINOV2, side: int = 224) -> None:
        super().__init__(path)
        check_whole(1, 4096, side=side)
        self.side = side

    def fingerprint(self) -> tuple[object, ...]:
        return self.side, *self._facts()

    def _load(self) -> nn.Module:
        return load_part("DINOv2Images", "Dinov2Model", self.path, "dinov2")

    def _embed(self, pictures: Tensor) -> Tensor:
        return self.network(pixel_values=pictures).last_hidden_state[:, 0]

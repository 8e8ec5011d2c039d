"""A diffusers pipeline with a transformer, in its folder or in Hugging Face's cache, as a source of denoisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unidad_pl.backbones.dit import DiTNetwork
from unidad_pl.backbones.flux import FluxNetwork
from unidad_pl.backbones.flux2 import Flux2Network
from unidad_pl.backbones.folders import (
    CONFIG_FILE,
    MOST_BLOCKS,
    MOST_SIDE,
    checked_config,
    empty_network,
    find_folder,
    in_diffusers,
)
from unidad_pl.backbones.lora import LoRA, add_adapters, base_names
from unidad_pl.backbones.sd3 import SD3Network
from unidad_pl.backbones.spec import find_scheduler
from unidad_pl.backbones.transformer import Taps, TransformerNetwork
from unidad_pl.backbones.weights import fill, read_folder, read_weights
from unidad_pl.backbones.z_image import ZImageNetwork
from unidad_pl.checks import check_choices, check_given, check_path, check_positive, check_whole
from unidad_pl.denoiser import Codec, DenoiserSource
from unidad_pl.files import read_json, reading

DEPTHS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers")
"""What configs call their numbers of blocks."""


class Transformer(DenoiserSource):
    """A diffusers pipeline whose network is a transformer; its class is read from the folder.

        >>> source = Transformer("models/stable-diffusion-3.5-medium", lora=LoRA(rank=32, base_dtype="bfloat16"))
        >>> [network.diffusers_class.removesuffix("Transformer2DModel") for network in source.networks]
        ['DiT', 'SD3', 'Flux', 'Flux2', 'ZImage']

    Args:
        path: the pipeline's folder, with ``transformer/``, ``vae/``, ``scheduler/`` and the text encoders; or the id of
            a model on Hugging Face that was downloaded before (nothing is downloaded here).
        resolution: side of the images in pixels; null: what the model was made for.
        lora: train adapters over the frozen transformer instead of all its weights; null: all weights. All networks of
            a run that start from this source share one transformer.
        guidance: the guidance scale that a network distilled from a guided one takes as an input, as FLUX.1-dev does;
            null: its pipeline's, or none.
        taps: the blocks a discriminator may read: those after a ``quarters``, half and three quarters of the depth, or
            ``all``.
        weights: file with the transformer's weights in place of the folder's, under diffusers' names; null: the
            folder's.

    Raises:
        ValueError: an unknown choice, or a number out of range.
    """

    networks: tuple[type[TransformerNetwork], ...] = (DiTNetwork, SD3Network, FluxNetwork, Flux2Network, ZImageNetwork)
    """What it knows; a subclass adds more."""

    def __init__(
        self, path: str, resolution: int | None = None, lora: LoRA | None = None, guidance: float | None = None,
        taps: Taps = "quarters", weights: str | None = None,
    ) -> None:  # fmt: skip
        check_given(path=path)
        check_path(path=path, weights=weights)
        check_whole(1, MOST_SIDE, null=True, resolution=resolution)
        check_positive(guidance=guidance)
        check_choices(taps=(taps, Taps))
        if lora is not None and not isinstance(lora, LoRA):
            raise ValueError(f"lora must be a LoRA or null, got {lora!r}")
        self.path, self.resolution, self.lora, self.guidance = path, resolution, lora, guidance
        self.taps: Taps = taps
        self.weights = weights

    def build(self) -> TransformerNetwork:
        """Load strictly.

        Raises:
            FileNotFoundError: a part is missing; names it.
            ImportError: the installed diffusers has no such class; names it.
            ValueError: a network or a scheduler that is not supported, a file that is not what it should be, or weights
                that do not fit or are not finite.
            ModuleNotFoundError: adapters without peft.
        """
        folder, kind = self._found()
        place = folder / TransformerNetwork.part
        net = empty_network(in_diffusers(kind.diffusers_class), place)
        with reading(place / CONFIG_FILE, f"config of a {kind.diffusers_class}"):
            self._network(kind, net, folder).check()
        fill(
            net, read_folder(place) if self.weights is None else read_weights(self.weights), self.weights or str(place)
        )
        return self._denoiser(kind, net, folder)

    def codec(self) -> Codec:
        from unidad_pl.backbones.pipelines import PipelineCodec

        folder, kind = self._found()
        return PipelineCodec(folder, kind, self.resolution)

    def architecture(self) -> TransformerNetwork:
        folder, kind = self._found()
        config = checked_config(of := in_diffusers(kind.diffusers_class), folder / TransformerNetwork.part)
        return self._denoiser(kind, of.from_config(config), folder)

    def _found(self) -> tuple[Path, type[TransformerNetwork]]:
        """The pipeline's folder, and what its transformer is used through."""
        folder = find_folder(self.path)
        for part in (f"{TransformerNetwork.part}/{CONFIG_FILE}", f"vae/{CONFIG_FILE}"):
            if not (folder / part).is_file():
                raise FileNotFoundError(
                    f"source model {self.path!r} has no {part}: give the folder of a pipeline with a transformer, as "
                    f"diffusers saves it; if it is one, its download is incomplete"
                )
        if find_scheduler(folder) is None:
            raise FileNotFoundError(f"source model {self.path!r} has no scheduler/: the download is incomplete")
        path = folder / TransformerNetwork.part / CONFIG_FILE
        config, known = (
            read_json(path, "config of a transformer"),
            {kind.diffusers_class: kind for kind in self.networks},
        )
        with reading(path, "config of a transformer"):
            name = config.get("_class_name")
            if name not in known:
                raise ValueError(f"it is of a {name!s:.60}; supported are {', '.join(known)}")
            check_whole(0, MOST_BLOCKS, null=True, **{depth: config.get(depth) for depth in DEPTHS})
        return folder, known[name]

    def _network(self, kind: type[TransformerNetwork], net: Any, folder: Path) -> TransformerNetwork:
        vae, scheduler = folder / "vae" / CONFIG_FILE, find_scheduler(folder)
        assert scheduler is not None  # _found looked
        entries = read_json(vae, "config of a VAE")
        with reading(vae, "config of a VAE"):
            scale = 2 ** (len(entries["block_out_channels"]) - 1) * kind.vae_fold
            of_vae = entries.get("latent_channels", 4) * kind.vae_fold**2
        channels, fold, _ = kind.sizes(net.config)
        if channels != of_vae:
            raise ValueError(f"its latents have {channels} channels, those of {str(vae)!r} {of_vae}")
        side = (self.resolution or 0) // scale or net.config.get("sample_size") or kind.usual_side
        if (self.resolution is not None and self.resolution != side * scale) or side % fold:
            raise ValueError(
                f"resolution must be a multiple of {scale * fold} pixels for this model, got "
                f"{self.resolution or side * scale}"
            )
        spec = kind.spec_of(scheduler, (side // fold) ** 2)
        return kind(net, spec, side, self.taps, self.guidance)

    def _denoiser(self, kind: type[TransformerNetwork], net: Any, folder: Path) -> TransformerNetwork:
        network = self._network(kind, net, folder)
        if self.lora is not None:
            add_adapters(network.transformer, self.lora, network.output_layer, network.adapted)
            network.shared_weights = base_names(network)
        return network.eval()

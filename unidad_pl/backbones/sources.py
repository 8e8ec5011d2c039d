"""A diffusers pipeline with a transformer, in its folder or in Hugging Face's cache, as a source of denoisers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from unidad_pl.backbones.dit import DiTNetwork
from unidad_pl.backbones.flux import FluxNetwork
from unidad_pl.backbones.flux2 import Flux2Network
from unidad_pl.backbones.folders import (
    CONFIG_FILE,
    MOST,
    MOST_BLOCKS,
    MOST_SIDE,
    checked_config,
    checked_network,
    in_diffusers,
)
from unidad_pl.backbones.hub import find_file, find_folder
from unidad_pl.backbones.lora import LoRA, add_adapters, base_names, store_in_bfloat16
from unidad_pl.backbones.sd3 import SD3Network
from unidad_pl.backbones.sd_files import FEW_STEP, TEXT, index_if_any, size_of_export
from unidad_pl.backbones.spec import SCHEDULER_FILE, find_scheduler
from unidad_pl.backbones.transformer import DEPTHS, SIZES, Taps, TransformerNetwork
from unidad_pl.backbones.weights import NETWORK, Stems, fill, read_folder, read_weights
from unidad_pl.backbones.z_image import ZImageNetwork
from unidad_pl.checks import check_choices, check_given, check_path, check_positive, check_whole
from unidad_pl.denoiser import Codec, DenoiserSource
from unidad_pl.files import read_json, reading


class Transformer(DenoiserSource):
    """A diffusers pipeline whose network is a transformer; its class is read from the folder.

        >>> source = Transformer("models/stable-diffusion-3.5-medium", lora=LoRA(rank=32, base_dtype="bfloat16"))
        >>> [network.diffusers_class.removesuffix("Transformer2DModel") for network in source.networks]
        ['DiT', 'SD3', 'Flux', 'Flux2', 'ZImage']

    Args:
        path: the pipeline's folder, with ``transformer/``, ``vae/``, ``scheduler/`` and the text encoders; or the id of
            a model on Hugging Face, which :meth:`build` downloads unless its cache has it.
        resolution: side of the images in pixels; null: what the model was made for.
        lora: train adapters over the frozen transformer instead of all its weights; null: all weights. All networks of
            a run that start from this source share one transformer.
        guidance: the guidance scale that a network distilled from a guided one takes as an input, as FLUX.1-dev does;
            null: its pipeline's, or none.
        taps: the blocks a discriminator may read: those after a ``quarters``, half and three quarters of the depth, or
            ``all``.
        weights: file with the transformer's weights in place of the folder's, under diffusers' names, or
            OWNER/NAME/FILE of Hugging Face; null: the folder's.
        local_files_only: download nothing: what is neither a folder nor in the cache is an error.

    Raises:
        ValueError: an unknown choice, or a number out of range.
    """

    networks: tuple[type[TransformerNetwork], ...] = (DiTNetwork, SD3Network, FluxNetwork, Flux2Network, ZImageNetwork)
    """What it knows; a subclass adds more."""

    def __init__(
        self, path: str, resolution: int | None = None, lora: LoRA | None = None, guidance: float | None = None,
        taps: Taps = "quarters", weights: str | None = None, local_files_only: bool = False,
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
        self.weights, self._local_only = weights, local_files_only

    def build(self) -> TransformerNetwork:
        """Load strictly.

        Raises:
            FileNotFoundError: a part is missing; names it.
            OSError: it must be downloaded and cannot; says why.
            ImportError: the installed diffusers has no such class; names it.
            ValueError: a network or a scheduler that is not supported, a file that is not what it should be, or weights
                that do not fit or are not finite.
            ModuleNotFoundError: adapters without peft.
        """
        own = () if self.weights else (TransformerNetwork.part,)
        folder, kind = self._found(own)
        net, place = self._checked(kind, folder), folder / TransformerNetwork.part
        given = self.weights
        state = read_folder(place) if given is None else read_weights(find_file(given, self._local_only))
        if self.lora is not None and self.lora.base_dtype != "float32":
            store_in_bfloat16(net, kind.output_layer)  # while it is empty: half of the memory that loading takes
        fill(net, state, given or str(place))
        return self._denoiser(kind, net, folder)

    def codec(self) -> Codec:
        from unidad_pl.backbones.pipelines import PipelineCodec, text_parts

        folder, kind = self._found()
        encoders = [name for name in text_parts(folder, kind) if name.startswith("text_encoder")]
        return PipelineCodec(
            folder, kind, self.resolution or size_of_export(folder), lambda: self._found(("vae", *encoders))[0]
        )

    def architecture(self) -> TransformerNetwork:
        folder, kind = self._found()
        net = self._checked(kind, folder)
        return self._denoiser(kind, type(net).from_config(net.config), folder)

    def _checked(self, kind: type[TransformerNetwork], folder: Path) -> Any:
        """The transformer that the config in ``folder`` describes, on the meta device, when it is seen to work."""
        place, of = folder / TransformerNetwork.part, in_diffusers(kind.diffusers_class)
        return checked_network(of, place, lambda net: self._network(kind, net, folder), *kind.older)

    def _found(self, weights: Collection[str] = ()) -> tuple[Path, type[TransformerNetwork]]:
        """The pipeline's folder with these parts' ``weights``, and what its transformer is used through."""

        def needed(folder: Path) -> dict[str, Stems]:
            self._kind_in(folder)
            return {part: TEXT if part.startswith("text_") else NETWORK for part in weights}

        text = {name for network in self.networks for name in network.text_parts}
        places = ("", TransformerNetwork.part, "vae", "scheduler", *text)
        folder = find_folder(self.path, places, needed, self._local_only)
        return folder, self._kind_in(folder)

    def _kind_in(self, folder: Path) -> type[TransformerNetwork]:
        path = folder / TransformerNetwork.part / CONFIG_FILE
        for part in (path, folder / "vae" / CONFIG_FILE, folder / "scheduler" / SCHEDULER_FILE):
            if not part.is_file():
                raise FileNotFoundError(
                    f"source model {self.path!r} has no {part.relative_to(folder)}: give the folder of a pipeline with "
                    f"a transformer, as diffusers saves it; if it is one, its download is incomplete"
                )
        config = read_json(path, "config of a transformer")
        known = {name: kind for kind in self.networks for name in (kind.diffusers_class, *kind.older)}
        with reading(path, "config of a transformer"):
            name = config.get("_class_name")
            if name not in known:
                raise ValueError(f"it is of a {name!s:.60}; supported are {', '.join(known)}")
            check_whole(0, MOST_BLOCKS, **{name: config[name] for name in DEPTHS if name in config})
            check_whole(1, MOST, **{name: config[name] for name in SIZES if name in config})
        pipeline = index_if_any(folder).get("_class_name", known[name].pipeline)
        if pipeline not in (known[name].pipeline, FEW_STEP):  # those that edit pictures have the same network
            raise ValueError(
                f"source model {self.path!r} is a {pipeline!s:.60}, which is not supported: give the text-to-image "
                f"model, a {known[name].pipeline}"
            )
        return known[name]

    def _network(self, kind: type[TransformerNetwork], net: Any, folder: Path) -> TransformerNetwork:
        vae, scheduler = folder / "vae" / CONFIG_FILE, find_scheduler(folder)
        assert scheduler is not None  # it was looked for when the folder was found
        entries = checked_config(in_diffusers(kind.vae), folder / "vae")
        with reading(vae, "config of a VAE"):
            scale = 2 ** (len(entries["block_out_channels"]) - 1) * kind.vae_fold
            of_vae = entries.get("latent_channels", 4) * kind.vae_fold**2
        channels, fold, _ = kind.sizes(net.config)
        if channels != of_vae:
            raise ValueError(f"its latents have {channels} channels, those of {str(vae)!r} {of_vae}")
        resolution = self.resolution or size_of_export(folder)
        side = (resolution or 0) // scale or net.config.get("sample_size") or kind.usual_side
        if (resolution is not None and resolution != side * scale) or side % fold:
            raise ValueError(
                f"resolution must be a multiple of {scale * fold} pixels for this model, got "
                f"{resolution or side * scale}"
            )
        spec = kind.spec_of(scheduler, (side // fold) ** 2)
        return kind(net, spec, side, self.taps, self.guidance, side * scale)

    def _denoiser(self, kind: type[TransformerNetwork], net: Any, folder: Path) -> TransformerNetwork:
        network = self._network(kind, net, folder)
        index = index_if_any(folder)
        network.distilled |= index.get("is_distilled") is True or index.get("_class_name") == FEW_STEP
        if self.lora is not None:
            add_adapters(network.transformer, self.lora, network.output_layer, network.adapted)
            network.shared_weights = base_names(network)
        return network.eval()

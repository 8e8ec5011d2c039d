"""From a checkpoint to a diffusers pipeline directory that samples where unidad_pl is not installed."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch.func import functional_call

from unidad_pl.backbones.latents import LatentCodec
from unidad_pl.backbones.sd_files import FEW_STEP
from unidad_pl.backbones.sources import Transformer
from unidad_pl.backbones.transformer import TransformerNetwork
from unidad_pl.backbones.unet import PretrainedUNet, UNetDenoiser
from unidad_pl.checks import check_arguments, check_choices
from unidad_pl.denoiser import Codec, Denoiser, DenoiserSource
from unidad_pl.export.card import model_card
from unidad_pl.export.folder import INDEX, WAY_OUT, is_text_export, note_files, read_record, refuse_foreign
from unidad_pl.export.text_to_image import (
    check_text_export,
    is_text_network,
    latent_codec,
    plain_network,
    stored_as,
    write_text_pipeline,
)
from unidad_pl.files import expanded, moved_aside, reading, recover, replacing
from unidad_pl.runs.student import TrainedStudent, Weights, load_student
from unidad_pl.sampling import FewStepSampler
from unidad_pl.training.conditions import ClassLabels

if TYPE_CHECKING:
    from unidad_pl.backbones.spec import UNetSpec

StoredAs = Literal["float32", "float16", "bfloat16"]


def can_export(network: Denoiser) -> bool:
    """Whether a student of this kind has a diffusers pipeline to be written as."""
    return is_own_network(network) or is_text_network(network)


def export_student(
    ckpt_path: str, out: str, weights: Weights = "auto", config: str | None = None, adapters: bool = False,
    dtype: StoredAs = "float32",
) -> Path:  # fmt: skip
    """Write a checkpoint's few-step student as a diffusers pipeline directory.

    ``DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)`` samples from it without unidad_pl, and
    ``PretrainedUNet(DIR)`` starts another run with it. The directory appears whole or not at all.

    Args:
        ckpt_path: the run's checkpoint.
        out: the directory to make; an earlier export is replaced, and nothing else.
        weights: ``ema``, ``raw`` or ``auto`` (ema where the checkpoint has it).
        config: the run's config.yaml; null: the one of the checkpoint's run folder.
        adapters: of a text-to-image student trained as adapters (LoRA): write them alone, for ``load_lora_weights``,
            and not the pipeline with the adapters merged into it.
        dtype: what the weights are stored in; half of the bytes with ``float16`` or ``bfloat16``. Of a network that
            predicts noise, whose rounding error is multiplied by the first sigma, ``float16`` stays nearer.

    Returns:
        The directory.

    Raises:
        FileExistsError: ``out`` holds something that no export wrote; names some of it.
        FileNotFoundError, ValueError: see :func:`~unidad_pl.runs.student.load_student`; or weights beyond ``dtype``.
        OSError: it cannot be written; an earlier export is still there.
    """
    check_choices(dtype=(dtype, StoredAs))
    check_arguments(export_student, {"adapters": adapters})
    target, stored = expanded(out), getattr(torch, dtype)
    recover(target)
    refuse_foreign(target)
    student = load_student(ckpt_path, weights, config)
    network = student.network
    if not can_export(network):
        raise ValueError(
            f"only diffusers' UNets, transformers of classes and flow transformers of prompts can be exported, this "
            f"student is a {type(network).__name__}: sample it with 'unidad sample'"
        )
    if adapters and not is_text_network(network):
        raise ValueError("only text-to-image students can be trained as adapters: leave --adapters out")
    with replacing(target) as part:
        part.mkdir()
        if is_text_network(network):
            write_text_pipeline(student, network, part, adapters, stored)
        elif is_own_network(network):
            _write(student, network, part, stored)
        card = model_card(student, Path(ckpt_path).name, adapters)
        (part / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        note_files(part)
        refuse_foreign(target)  # again: writing took its time
    return target


def is_own_network(network: Denoiser) -> TypeGuard[UNetDenoiser | TransformerNetwork]:
    """Whether a student of this kind becomes a pipeline of ours: of pixels, or of classes and latents."""
    return isinstance(network, UNetDenoiser) or (isinstance(network, TransformerNetwork) and not network.takes_prompts)


def load_export(folder: str | Path) -> TrainedStudent:
    """The student of a directory that :func:`export_student` wrote.

    Raises:
        FileNotFoundError: there is none, or a file is missing in it.
        ValueError: it is something else, or a file in it is not what an export writes (:class:`BrokenFile`) or has
            weights that are not finite; names the file.
    """
    place = expanded(folder)
    if (aside := moved_aside(place)) is not None:
        raise FileNotFoundError(
            f"{str(folder)!r} was moved to {str(aside)!r} by an export that was killed before the new one took its "
            f"place: rename it back, or export again"
        )
    record = read_record(place)
    model = _source(place, record)
    folder_of_network = place / (TransformerNetwork.part if isinstance(model, Transformer) else "unet")
    with reading(folder_of_network, "network", WAY_OUT):
        network, codec = model.build().requires_grad_(False), model.codec()
    if isinstance(codec, LatentCodec):
        _try_codec(codec, place, network)
    with reading(folder_of_network, "network", WAY_OUT):
        _try_network(network, codec, record)
        sampler = FewStepSampler(torch.tensor(record["sigmas"], dtype=torch.float64))
        classes = ClassLabels(network.num_classes, record.get("classes")).classes or None
    return TrainedStudent(
        network, sampler, record["sigma_min"], record["weights"], record["iteration"], classes, {}, place, codec,
        record.get("token"),
    )  # fmt: skip


def _source(place: Path, record: dict[str, Any]) -> DenoiserSource:
    if is_text_export(place):
        return check_text_export(place, record)
    if (place / TransformerNetwork.part).is_dir():
        return Transformer(str(place), record.get("resolution"))
    return PretrainedUNet(str(place))


def _try_codec(codec: LatentCodec, place: Path, network: Denoiser) -> None:
    """Refuse a VAE or text encoders that cannot be used."""
    with reading(place, "pipeline", WAY_OUT):
        parts = codec.parts
    if network.takes_prompts:
        with reading(place / "text_encoder", "text encoder", WAY_OUT):
            codec.embed([""])
    with reading(place / "vae", "VAE", WAY_OUT):
        side = 2 ** (len(parts.vae.config["block_out_channels"]) - 1)
        codec.decode(torch.zeros(1, network.image_shape[0], side, side))


def _try_network(network: Denoiser, codec: Codec, record: dict[str, Any]) -> None:
    """Refuse a network that does not fit the record, or cannot run."""
    if is_own_network(network):
        for name, value in _described(network.spec).items():
            if (type(record["spec"][name]), record["spec"][name]) != (type(value), value):
                raise ValueError(f"{name} is {record['spec'][name]!r} in {INDEX}, {value!r} beside it")
    if isinstance(network, TransformerNetwork):  # strictly loaded; tables that some keep would stay on the meta device
        return
    cond = codec.embed([""]) if network.takes_prompts else network.blank_condition(1)
    # On the meta device a pass costs nothing, and still goes through every layer with its options and shapes.
    tensors = {name: value.to("meta") for name, value in (*network.named_parameters(), *network.named_buffers())}
    inputs = (torch.empty(1, *network.image_shape, device="meta"), torch.empty(1, device="meta"))
    functional_call(network, tensors, (*inputs, None if cond is None else cond.to("meta")))


def _write(
    student: TrainedStudent, network: UNetDenoiser | TransformerNetwork, folder: Path, dtype: torch.dtype
) -> None:
    spec, scheduler, net = network.spec, _scheduler(network.spec), plain_network(network, dtype)
    parts = {network.part: net, "scheduler": scheduler}
    if isinstance(network, UNetDenoiser):
        UNetDenoiser(net, spec).save_pretrained(folder / network.part, dtype)
    else:
        parts["vae"] = stored_as(latent_codec(student).parts.vae, dtype, "vae")
        net.save_pretrained(folder / network.part)
        parts["vae"].save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    shutil.copyfile(Path(__file__).with_name("pipeline.py"), folder / "pipeline.py")
    index = {
        "_class_name": FEW_STEP, "_diffusers_version": version("diffusers"),
        **{name: ["diffusers", type(one).__name__] for name, one in parts.items()},
        "sigmas": student.sampler.sigmas, "sigma_min": student.sigma_min, "spec": _described(spec),
        "classes": student.classes, "weights": student.weights, "iteration": student.iteration,
    }  # fmt: skip
    if isinstance(network, TransformerNetwork):
        index["resolution"] = network.resolution
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _described(spec: UNetSpec) -> dict[str, Any]:
    """What the pipeline must know of a network, besides its scheduler."""
    return {name: getattr(spec, name) for name in ("prediction", "sigma_data", "patch_size", "timestep")}


def _scheduler(spec: UNetSpec) -> Any:
    """A diffusers scheduler of the network's noise levels, for other samplers."""
    if spec.prediction == "flow":
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(spec.train_timesteps, spec.shift)
    if spec.prediction != "edm":
        return spec.scheduler("DDPMScheduler")
    from diffusers import EDMEulerScheduler

    return EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=spec.sigma_data)

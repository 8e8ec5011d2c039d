"""From a checkpoint to a diffusers pipeline directory that samples where unidad_pl is not installed."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unidad_pl.backbones.stable_diffusion import StableDiffusionUNet
from unidad_pl.backbones.unet import PretrainedUNet, UNetDenoiser
from unidad_pl.denoiser import DenoiserSource
from unidad_pl.export.card import model_card
from unidad_pl.export.text_to_image import is_text_export, read_text_export, write_text_pipeline
from unidad_pl.files import replacing
from unidad_pl.runs.student import TrainedStudent, Weights, load_student
from unidad_pl.sampling import FewStepSampler

if TYPE_CHECKING:
    from unidad_pl.backbones.spec import UNetSpec

INDEX = "model_index.json"
PIPELINE = "FewStepPipeline"


def export_student(
    ckpt_path: str, out: str, weights: Weights = "auto", config: str | None = None, adapters: bool = False
) -> Path:
    """Write a checkpoint's few-step student as a diffusers pipeline directory.

    ``DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)`` samples from it without unidad_pl, and
    ``PretrainedUNet(DIR)`` starts another run with it. The directory appears whole or not at all.

    Args:
        ckpt_path: the run's checkpoint.
        out: the directory to make; an earlier export is replaced.
        weights: ``ema``, ``raw`` or ``auto`` (ema where the checkpoint has it).
        config: the run's config.yaml; null: the one of the checkpoint's run folder.
        adapters: of a text-to-image student trained as adapters (LoRA): write them alone, for ``load_lora_weights``,
            and not the pipeline with the adapters merged into it.

    Returns:
        The directory.

    Raises:
        FileExistsError: ``out`` holds something else than an export.
        FileNotFoundError, ValueError: see :func:`~unidad_pl.runs.student.load_student`.
    """
    target = Path(out)
    if target.exists() and not _is_export(target) and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{out!r} is there and is no earlier export: choose another folder, or remove it")
    student = load_student(ckpt_path, weights, config)
    if not isinstance(student.network, (UNetDenoiser, StableDiffusionUNet)):
        raise ValueError(f"only diffusers UNets can be exported, this student is a {type(student.network).__name__}")
    if adapters and not isinstance(student.network, StableDiffusionUNet):
        raise ValueError("only text-to-image students can be trained as adapters: leave --adapters out")
    with replacing(target) as part:
        part.mkdir()
        if isinstance(student.network, StableDiffusionUNet):
            write_text_pipeline(student, student.network, part, adapters)
        else:
            _write(student, student.network, part)
        (part / "README.md").write_text(model_card(student, Path(ckpt_path).name, adapters))
    return target


def load_export(folder: str | Path) -> TrainedStudent:
    """The student of a directory that :func:`export_student` wrote.

    Raises:
        FileNotFoundError, ValueError: it is none, or is broken; says what.
    """
    place = Path(folder)
    model: DenoiserSource = PretrainedUNet(str(folder))
    if is_text_export(place):
        model, record = read_text_export(place)
    elif _is_export(place):
        record = {name.removeprefix("_"): value for name, value in json.loads((place / INDEX).read_text()).items()}
    else:
        raise ValueError(f"{str(folder)!r} is neither a checkpoint nor a directory that 'unidad export' wrote")
    sampler = FewStepSampler(torch.tensor(record["sigmas"], dtype=torch.float64))
    return TrainedStudent(
        model.build().requires_grad_(False), sampler, record["sigma_min"], record["weights"], record["iteration"],
        record.get("classes"), {}, place, model.codec(),
    )  # fmt: skip


def _is_export(folder: Path) -> bool:
    if is_text_export(folder):
        return True
    try:
        name = json.loads((folder / INDEX).read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(name == ["pipeline", PIPELINE])


def _write(student: TrainedStudent, network: UNetDenoiser, folder: Path) -> None:
    spec, scheduler = network.spec, _scheduler(network.spec)
    network.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    shutil.copyfile(Path(__file__).with_name("pipeline.py"), folder / "pipeline.py")
    index = {
        "_class_name": ["pipeline", PIPELINE], "_diffusers_version": version("diffusers"),
        "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", type(scheduler).__name__],
        "sigmas": student.sampler.sigmas, "sigma_min": student.sigma_min, "prediction": spec.prediction,
        "sigma_data": spec.sigma_data, "patch_size": spec.patch_size, "timestep": spec.timestep,
        "classes": student.classes, "_weights": student.weights, "_iteration": student.iteration,
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _scheduler(spec: UNetSpec) -> Any:
    """A diffusers scheduler of the network's noise levels, for other samplers."""
    if spec.prediction != "edm":
        return spec.scheduler("DDPMScheduler")
    from diffusers import EDMEulerScheduler

    return EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=spec.sigma_data)

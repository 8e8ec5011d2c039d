"""From a checkpoint to a diffusers pipeline directory that samples where unidad_pl is not installed."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unidad_pl.backbones.stable_diffusion import StableDiffusionUNet
from unidad_pl.backbones.unet import PretrainedUNet, UNetDenoiser
from unidad_pl.export_text import is_text_export, load_text_export, write_text_pipeline
from unidad_pl.runs import TrainedStudent, load_student
from unidad_pl.sampling import FewStepSampler

if TYPE_CHECKING:
    from unidad_pl.backbones.unet_spec import UNetSpec

INDEX = "model_index.json"
PIPELINE = "FewStepPipeline"
METRICS = "metrics.jsonl"


def export(ckpt_path: str, out: str, weights: str = "auto", config: str | None = None, adapters: bool = False) -> Path:
    """Write a checkpoint's few-step student as a diffusers pipeline directory.

    ``DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)`` samples from it without unidad_pl, and
    ``PretrainedUNet(DIR)`` starts another run with it. The directory appears whole or not at all.

    Args:
        ckpt_path: the run's checkpoint.
        out: the directory to make; an earlier export is replaced.
        weights: ``ema``, ``raw`` or ``auto`` (ema where the checkpoint has it).
        config: the run's config.yaml; null: the one of the checkpoint's run folder.
        adapters: of a text-to-image student trained as adapters (LoRA): write them alone, for ``load_lora_weights``,
            and not the whole pipeline with the adapters merged into it.

    Returns:
        The directory.

    Raises:
        FileExistsError: ``out`` holds something else than an export.
        FileNotFoundError, ValueError: see :func:`~unidad_pl.runs.load_student`.
    """
    target = Path(out)
    if target.exists() and not _is_export(target) and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{out!r} is there and is no earlier export: choose another folder, or remove it")
    student = load_student(ckpt_path, weights, config)
    if not isinstance(student.network, (UNetDenoiser, StableDiffusionUNet)):
        raise ValueError(f"only diffusers UNets can be exported, this student is a {type(student.network).__name__}")
    if adapters and not isinstance(student.network, StableDiffusionUNet):
        raise ValueError("only text-to-image students can be trained as adapters: leave --adapters out")
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    try:
        if isinstance(student.network, StableDiffusionUNet):
            write_text_pipeline(student, student.network, part, adapters)
        else:
            _write(student, student.network, part)
        (part / "README.md").write_text(model_card(student, Path(ckpt_path).name, adapters))
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def load_export(folder: str | Path) -> TrainedStudent:
    """The student of a directory that :func:`export` wrote.

    Raises:
        FileNotFoundError, ValueError: it is none, or is broken; says what.
    """
    if is_text_export(Path(folder)):
        return load_text_export(Path(folder))
    if not _is_export(Path(folder)):
        raise ValueError(f"{str(folder)!r} is neither a checkpoint nor a directory that 'unidad export' wrote")
    index = json.loads((Path(folder) / INDEX).read_text())
    network = PretrainedUNet(str(folder)).build().requires_grad_(False)
    sampler = FewStepSampler(_tensor(index["sigmas"]))
    return TrainedStudent(network, sampler, index["sigma_end"], index["_weights"], index["_iteration"],
                          index["classes"], {}, Path(folder))  # fmt: skip


def _tensor(values: list[float]) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.float64)


def _is_export(folder: Path) -> bool:
    if is_text_export(folder):
        return True
    try:
        name = json.loads((folder / INDEX).read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(name == ["pipeline", PIPELINE])


def _write(student: TrainedStudent, network: UNetDenoiser, folder: Path) -> None:
    spec = network.spec
    network.save_pretrained(folder / "unet")
    scheduler = _scheduler(spec)
    scheduler.save_pretrained(folder / "scheduler")
    shutil.copyfile(Path(__file__).with_name("pipeline.py"), folder / "pipeline.py")
    index = {
        "_class_name": ["pipeline", PIPELINE],
        "_diffusers_version": version("diffusers"),
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "sigmas": student.sampler.sigmas,
        "sigma_end": student.sigma_end,
        "prediction": spec.prediction,
        "sigma_data": spec.sigma_data,
        "patch_size": spec.patch_size,
        "timestep": spec.timestep,
        "classes": student.classes,
        "_weights": student.weights,
        "_iteration": student.iteration,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _scheduler(spec: UNetSpec) -> Any:
    """A diffusers scheduler of the network's noise levels, for other samplers."""
    from diffusers import DDPMScheduler, EDMEulerScheduler

    if spec.prediction == "edm":
        return EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=spec.sigma_data)
    return DDPMScheduler(
        num_train_timesteps=spec.train_timesteps, beta_start=spec.beta_start, beta_end=spec.beta_end,
        beta_schedule=spec.beta_schedule, prediction_type=spec.prediction,
    )  # fmt: skip


CARD = """---
license: other  # fill in: it depends on the source model's and the images' licences
library_name: diffusers
pipeline_tag: {task}
tags: [few-step, few-shot, uni-dad]
---
# {title}

A {steps}-step generator of {shape} {what}, trained with Uni-DAD (arXiv 2511.18281) by unidad_pl {version}.

```python
{usage}
```

- licence of the weights: (fill in)
- licence and source of the training images: (fill in)
- data: {data}
- checkpoint: {checkpoint}, iteration {iteration}, {weights} weights
- seed: {seed}
- steps at sigma: {sigmas}
- versions: {versions}

## Metrics

{metrics}

## Config

```yaml
{config}```
"""


PIXEL_USAGE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", trust_remote_code=True)  # runs pipeline.py of this folder
images = pipe(seeds=[0, 1, 2, 3]).images"""
TEXT_USAGE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER")
images = pipe({prompt!r}, num_inference_steps={steps}, guidance_scale=1.0).images  # guidance is distilled into it"""

ADAPTER_USAGE = """from diffusers import DiffusionPipeline, LCMScheduler

pipe = DiffusionPipeline.from_pretrained({base!r})  # the model that the adapters were trained over
{other_weights}pipe.load_lora_weights("THIS_FOLDER")
pipe.scheduler = LCMScheduler.from_pretrained("THIS_FOLDER", subfolder="scheduler")
size = dict(height={{side}}, width={{side}})
images = pipe({{prompt!r}}, num_inference_steps={{steps}}, guidance_scale=1.0, **size).images"""

OTHER_WEIGHTS = """from unidad_pl.backbones import StableDiffusion

pipe.unet = StableDiffusion({base!r}, unet_weights={file!r}).build().unet  # they were trained over these weights
"""


def _usage(config: dict[str, Any], adapters: bool) -> str:
    model = (config.get("model") or {}).get("init_args") or {}
    source = model.get("student_source") or model.get("source") or {}
    init = source.get("init_args") or {}
    base, file = init.get("path", "THE_BASE_MODEL"), init.get("unet_weights")
    other = "" if file is None else OTHER_WEIGHTS.format(base=base, file=file)
    return ADAPTER_USAGE.format(base=base, other_weights=other) if adapters else TEXT_USAGE


def model_card(student: TrainedStudent, checkpoint: str, adapters: bool = False) -> str:
    """The README.md of an export: how to use it, data, config, metrics, seed, versions, licences to fill in."""
    import yaml

    config = student.config
    data = (config.get("data") or {}).get("init_args") or {}
    channels, height, width = student.network.image_shape
    text = isinstance(student.network, StableDiffusionUNet)
    subject = f"a {data.get('token', 'prt')} {data.get('class_word') or 'subject'}"
    return CARD.format(
        title=data.get("domain") or Path(str(data.get("root") or "few-step student")).name,
        steps=len(student.sampler), shape=f"{height}x{width}x{channels}", version=version("unidad_pl"),
        data=", ".join(f"{name} {data[name]}" for name in ("domain", "root", "shots", "seed") if data.get(name)) or "?",
        checkpoint=checkpoint, iteration=student.iteration, weights=student.weights,
        seed=config.get("seed_everything"), sigmas=", ".join(f"{sigma:.4g}" for sigma in student.sampler.sigmas),
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "lightning")),
        task="text-to-image" if text else "unconditional-image-generation", what="latents" if text else "images",
        usage=_usage(config, adapters).format(
            prompt=subject, steps=len(student.sampler), side=getattr(student.network, "resolution", None)
        ) if text else PIXEL_USAGE,
        metrics=_metrics_table(student.folder), config=yaml.safe_dump(config, sort_keys=False),
    )  # fmt: skip


def _metrics_table(folder: Path | None) -> str:
    """The last record of every metric and stage of a run as a Markdown table."""
    from unidad_pl.callbacks.records import read_records

    path = None if folder is None else folder / METRICS
    if path is None or not path.is_file():
        return "None were recorded."
    last = {(r.get("metric"), r.get("stage")): r for r in read_records(path)}
    rows = [
        f"| {name} | {value:.4g} | {r.get('stage')} | {r.get('step')} | {r.get('samples')} | {r.get('extractor', '')} |"
        for r in last.values()
        for name, value in (r.get("values") or {}).items()
        if isinstance(value, (int, float))
    ]
    return "\n".join(["| metric | value | stage | step | samples | extractor |", "|---|---:|---|---:|---:|---|", *rows])

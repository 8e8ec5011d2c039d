"""The README.md of an export: how to use it, data, config, metrics, seed, versions, licences to fill in."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unidad_pl.backbones.latents import LatentCodec
from unidad_pl.backbones.transformer import TransformerNetwork
from unidad_pl.callbacks.records import FILE, read_records
from unidad_pl.export.text_to_image import TextNetwork, is_text_network
from unidad_pl.runs.student import TrainedStudent

log = logging.getLogger(__name__)
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

ADAPTER_USAGE = """from diffusers import DiffusionPipeline, {scheduler}

pipe = DiffusionPipeline.from_pretrained({base!r}{absent})  # the model that the adapters were trained over
{other_weights}pipe.load_lora_weights("THIS_FOLDER")
pipe.scheduler = {scheduler}.from_pretrained("THIS_FOLDER", subfolder="scheduler")
"""
SIZED = """size = dict(height={side}, width={side})
images = pipe({prompt!r}, num_inference_steps={steps}, guidance_scale=1.0, **size).images"""

FLOW_USAGE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER"{absent})
"""
TIMED = """levels = dict(sigmas={times}, guidance_scale={guidance})  # as it was trained: without them it draws badly
images = pipe(prompt={prompt!r}, num_inference_steps={steps}, height={side}, width={side}, **levels).images"""

OTHER_WEIGHTS = """from unidad_pl.backbones import {source}

pipe.{part} = {source}({base!r}, {option}={file!r}).build().{part}  # they were trained over these weights
"""


def _usage(student: TrainedStudent, prompt: str, adapters: bool) -> str:
    """How plain diffusers draws with the export."""
    network = student.network
    if not is_text_network(network):
        return PIXEL_USAGE
    flow = isinstance(network, TransformerNetwork)
    use = SIZED if adapters else TEXT_USAGE
    if flow:
        use = TIMED if adapters else FLOW_USAGE + TIMED
    return (_adapted(student, network, flow) if adapters else "") + use.format(
        absent=_absent(student),
        prompt=prompt, steps=len(student.sampler), side=network.resolution,
        times=[round(sigma / (1 + sigma), 6) for sigma in student.sampler.sigmas],
        guidance=getattr(network, "guidance", None) or 0.0,
    )  # fmt: skip


def _adapted(student: TrainedStudent, network: TextNetwork, flow: bool) -> str:
    """Getting the base with the adapters over it."""
    model = (student.config.get("model") or {}).get("init_args") or {}
    source = (model.get("student") or {}).get("init_from") or model.get("source") or {}
    init = source.get("init_args") or {}
    base, option = init.get("path", "THE_BASE_MODEL"), "weights" if flow else "unet_weights"
    kind, part = "Transformer" if flow else "StableDiffusion", network.part
    other = OTHER_WEIGHTS.format(base=base, option=option, file=init.get(option), source=kind, part=part)
    scheduler = "FlowMatchEulerDiscreteScheduler" if flow else "LCMScheduler"
    return ADAPTER_USAGE.format(
        base=base, other_weights=other if init.get(option) else "", scheduler=scheduler, absent=_absent(student)
    )


def _absent(student: TrainedStudent) -> str:
    """Parts that the model goes without, as diffusers wants to be told."""
    network, codec = student.network, student.codec
    if not (isinstance(network, TransformerNetwork) and isinstance(codec, LatentCodec)):
        return ""
    return "".join(f", {name}=None" for name in network.dispensable if getattr(codec.parts, name, None) is None)


def model_card(student: TrainedStudent, checkpoint: str, adapters: bool = False) -> str:
    """The README.md of an export: how to use it, data, config, metrics, seed, versions, licences to fill in."""
    import yaml

    config = student.config
    data = (config.get("data") or {}).get("init_args") or {}
    channels, height, width = student.network.image_shape
    text = is_text_network(student.network)
    subject = f"a {data.get('token', 'prt')} {data.get('class_word') or 'subject'}"
    return CARD.format(
        title=Path(str(data.get("root") or "few-step student").removeprefix("builtin:")).name,
        steps=len(student.sampler), shape=f"{height}x{width}x{channels}", version=version("unidad_pl"),
        data=", ".join(f"{name} {data[name]}" for name in ("root", "shots", "seed") if data.get(name)) or "?",
        checkpoint=checkpoint, iteration=student.iteration, weights=student.weights,
        seed=config.get("seed_everything"), sigmas=", ".join(f"{sigma:.4g}" for sigma in student.sampler.sigmas),
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "lightning")),
        task="text-to-image" if text else "unconditional-image-generation",
        what="latents" if isinstance(student.codec, LatentCodec) else "images",
        usage=_usage(student, subject, adapters),
        metrics=_metrics_table(student.folder), config=yaml.safe_dump(config, sort_keys=False),
    )  # fmt: skip


def config_of_card(folder: Path) -> dict[str, Any]:
    """The run's config that the card of an export holds; empty where there is none, or none that can be read."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        found = yaml.safe_load(text.rpartition("## Config\n\n```yaml\n")[2].partition("```")[0])
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) and text.count("## Config") else {}


def _metrics_table(folder: Path | None) -> str:
    """The last record of every metric and stage of a run as a Markdown table, and below it what could not be read."""
    path = None if folder is None else folder / FILE
    if path is None or not path.is_file():
        return "None were recorded."
    left_out: list[str] = []  # the student is whole whatever became of a line about it
    last = {(r.get("metric"), r["stage"]): r for r in read_records(path, left_out)}
    for one in left_out:
        log.warning("not in the model card: %s", one)
    rows = [
        f"| {name} | {value:.4g} | {r['stage']} | {r['step']} | {r.get('samples')} | {r.get('extractor', '')} |"
        for r in last.values()
        for name, value in r["values"].items()
        if value is not None
    ]
    table = ["| metric | value | stage | step | samples | extractor |", "|---|---:|---|---:|---:|---|", *rows]
    return "\n".join(table + (["", "Not in this table:", ""] if left_out else []) + [f"- {one}" for one in left_out])

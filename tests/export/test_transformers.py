"""Students of transformers that read prompts, as the pipelines of diffusers that their sources were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.backbones.conformance import TINY_VAE
from tests.backbones.test_dit import TestDiT as DiT
from tests.backbones.test_pipelines import KINDS, Case, saved
from tests.export.made import export
from tests.metrics.toys import refused
from unidad_pl import load_export
from unidad_pl.backbones import LoRA, Transformer
from unidad_pl.backbones.transformer import unpacked
from unidad_pl.cli.sample import sample
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Codec
from unidad_pl.export.card import model_card
from unidad_pl.runs.student import TrainedStudent
from unidad_pl.sampling import FewStepSampler
from unidad_pl.training.networks import content_hash

pytestmark = pytest.mark.slow

PROMPT, SEED = "a prt dog", 5
TIMES = [0.999, 0.7, 0.3]


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return saved(request.param, tmp_path_factory.mktemp(request.param) / "pipeline")


def trained(case: Case, lora: LoRA | None = None) -> TrainedStudent:
    """A student whose weights are not its source's, at noise levels of its own."""
    source = Transformer(str(case.folder), case.source.resolution, lora)
    network = source.build().requires_grad_(False)
    torch.manual_seed(1)
    for name, weight in network.named_parameters():
        if ".lora_" in name or (lora is None and weight.ndim == 2):
            weight.add_(torch.randn_like(weight), alpha=0.1 if lora is None else 0.5)
    sigmas = [t / (1 - t) for t in TIMES]
    sampler = FewStepSampler(torch.tensor(sigmas, dtype=torch.float64))
    described = {"class_path": "unidad_pl.Transformer", "init_args": {"path": str(case.folder)}}
    data = {"init_args": {"token": "prt", "class_word": "dog"}}
    config = {"model": {"init_args": {"source": described}}, "data": data}
    return TrainedStudent(network, sampler, 0.1, "raw", 7, None, config, None, source.codec(), "prt")


def noise_of(case: Case, network: Any) -> Callable[[], Tensor]:
    """The draws of a pipeline from torch's random state: FLUX's draw tokens between the steps."""
    shape = (1, *network.image_shape)
    drawn = []

    def noise() -> Tensor:
        drawn.append(True)
        if len(drawn) == 1 or not isinstance(case.pipe, (diffusers.FluxPipeline, diffusers.Flux2KleinPipeline)):
            return torch.randn(shape)
        fold = network.fold
        tokens = torch.randn(1, shape[2] * shape[3] // fold**2, shape[1] * fold**2)
        return unpacked(tokens, fold, torch.Size(shape))

    return noise


@torch.no_grad()
def ours(student: TrainedStudent, case: Case) -> Tensor:
    """A picture [1, 3, R, R] in [0, 1]."""
    torch.manual_seed(SEED)
    cond = student.codec.embed([PROMPT])
    return student.codec.decode(
        student.sampler(student.network, noise_of(case, student.network), cond)
    ).clamp(-1, 1) / 2 + 0.5  # fmt: skip


def theirs(card: str, folder: Path) -> Tensor:
    """What the card's own lines draw."""
    code = card.partition("```python\n")[2].partition("```")[0].replace("THIS_FOLDER", str(folder))
    code = code.replace("height=", 'output_type="pt", height=')
    begun, _, drawn = code.partition("levels = ")
    names: dict[str, Any] = {}
    exec(begun + "pipe.set_progress_bar_config(disable=True)\n", names)
    torch.manual_seed(SEED)
    exec("levels = " + drawn, names)
    return names["images"]


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_plain_diffusers_draws_what_the_student_draws(case: Case, lora: LoRA | None, tmp_path: Path) -> None:
    student = trained(case, lora)
    out = export(student, tmp_path / "out")
    expected = ours(student, case)
    card = (out / "README.md").read_text()
    assert (theirs(card, out) - expected).abs().max() <= 2 / 255
    untrained = trained(case, lora)
    untrained.network = Transformer(str(case.folder), case.source.resolution).build()
    assert (ours(untrained, case) - expected).abs().max() > 2 / 255

    again = load_export(out)
    torch.testing.assert_close(ours(again, case), expected, atol=1e-4, rtol=0)
    assert again.sampler.sigmas == student.sampler.sigmas
    assert again.with_steps(2).sigmas == student.with_steps(2).sigmas
    assert again.network.own_sigmas(4) == student.network.own_sigmas(4)  # the source's shift of time
    assert again.token == "prt"
    if lora is None:
        assert content_hash(again.network) == content_hash(student.network)
    sample(str(out), 1, str(tmp_path / "drawn"), seed=SEED, prompts=[PROMPT], device="cpu")
    assert (tmp_path / "drawn" / f"{SEED:06d}.png").is_file()


def test_adapters_alone(case: Case, tmp_path: Path) -> None:
    student = trained(case, LoRA(rank=2, alpha=6.0))
    out = export(student, tmp_path / "out", adapters=True)
    assert not (out / "transformer").exists()
    card = (out / "README.md").read_text()
    assert "pipe.load_lora_weights" in card
    assert (theirs(card, out) - ours(student, case)).abs().max() <= 2 / 255
    refused("holds adapters only", load_export, out)
    refused("trained without adapters", export, trained(case), tmp_path / "other", adapters=True)


def test_half_the_bytes(case: Case, tmp_path: Path) -> None:
    student = trained(case)
    out = export(student, tmp_path / "out", dtype="bfloat16")
    absent: Any = {name: None for name, part in case.pipe.components.items() if part is None}
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, torch_dtype=torch.bfloat16, **absent)
    assert pipe.transformer.dtype == torch.bfloat16
    assert model_card(student, "last.ckpt").count("sigmas=[0.999, 0.7, 0.3]") == 1
    assert (ours(load_export(out), case) - ours(student, case)).abs().mean() < 0.05


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    """A whole DiT pipeline, saved by diffusers."""
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(**DiT.config)
    vae = diffusers.AutoencoderKL(**TINY_VAE, scaling_factor=0.5, shift_factor=0.1)
    diffusers.DiTPipeline(net, vae, diffusers.DDIMScheduler(), {0: "cat"}).save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def of_classes(folder: Path, resolution: int | None, lora: LoRA | None = None) -> TrainedStudent:
    source = Transformer(str(folder), resolution, lora)
    network = source.build().requires_grad_(False)
    torch.manual_seed(1)
    for name, weight in network.named_parameters():
        if lora is None or ".lora_" in name:
            weight.add_(torch.randn_like(weight), alpha=0.1)
    sampler = FewStepSampler(torch.tensor([80.0, 4.0, 0.5], dtype=torch.float64))
    return TrainedStudent(network, sampler, 0.5, "raw", 7, [3, 7], {}, None, source.codec())


@torch.no_grad()
def of_each(student: TrainedStudent, seeds: list[int], labels: list[int]) -> Tensor:
    """A picture [B, 3, R, R] in [0, 1] for each seed and class."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.stack([torch.randn(student.network.image_shape, generator=one) for one in generators])

    latents = student.sampler(student.network, noise, Condition(torch.tensor(labels)))
    return student.codec.decode(latents).clamp(-1, 1) / 2 + 0.5


@pytest.mark.parametrize("resolution", [16, 32])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_a_model_of_classes(dit: Path, resolution: int, lora: LoRA | None, tmp_path: Path) -> None:
    """By its card, in diffusers alone: each seed its picture, and the classes in turn."""
    student = of_classes(dit, resolution, lora)
    out = export(student, tmp_path / "out")
    seeds, labels = [0, 1, 5], [3, 7, 7]
    expected = of_each(student, seeds, labels)
    assert expected.shape == (3, 3, resolution, resolution)
    card = (out / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("THIS_FOLDER", str(out))
    names: dict[str, Any] = {}
    exec(code, names)
    pipe = names["pipe"]
    assert [picture.size for picture in names["images"]] == [(resolution, resolution)] * 4
    drawn = pipe(seeds=seeds, output_type="pt").images
    assert (drawn - expected).abs().max() <= 2 / 255
    assert torch.equal(pipe(seeds=seeds, class_labels=labels, output_type="pt").images, drawn)
    assert (pipe(seeds=seeds, class_labels=[1, 1, 1], output_type="pt").images - drawn).abs().max() > 2 / 255

    untrained = of_classes(dit, resolution)
    untrained.network = Transformer(str(dit), resolution).build()
    assert (of_each(untrained, seeds, labels) - expected).abs().max() > 2 / 255

    pipe.save_pretrained(tmp_path / "saved")
    assert Transformer(str(out)).build().resolution == resolution  # as a source it is what it was trained for
    for wrong in ([10, 3, 3], [-1, 3, 3], [1.5, 3, 3], [None, 3, 3]):
        refused(r"class_labels must be whole numbers in 0\.\.9", pipe, seeds=seeds, class_labels=wrong)
    for none in (dict(seeds=[]), dict(generator=[]), dict(batch_size=0)):
        refused("there is no image to draw", pipe, **none)
    refused("num_inference_steps must be a whole number", pipe, num_inference_steps=2.5)
    again = load_export(out)
    torch.testing.assert_close(of_each(again, seeds, labels), expected, atol=1e-4, rtol=0)
    assert (again.classes, again.sampler.sigmas, again.iteration) == ([3, 7], student.sampler.sigmas, 7)
    assert again.network.distilled  # as a teacher it would be warned of
    saved_again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(saved_again(seeds=seeds, output_type="pt").images, drawn)
    sample(str(out), 2, str(tmp_path / "drawn"), seed=5, device="cpu")
    assert sorted(path.name for path in (tmp_path / "drawn").glob("*.png")) == ["000005.png", "000006.png"]


def test_half_the_bytes_of_a_model_of_classes(dit: Path, tmp_path: Path) -> None:
    student = of_classes(dit, 16)
    out = export(student, tmp_path / "out", dtype="float16")
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, trust_remote_code=True, torch_dtype=torch.float16)
    assert pipe.vae.dtype == pipe.transformer.dtype == torch.float16
    assert (pipe(seeds=[0], output_type="pt").images - of_each(student, [0], [3])).abs().mean() < 0.01


def test_what_a_model_of_classes_has_not(dit: Path, tmp_path: Path) -> None:
    student = of_classes(dit, 16)
    refused("only text-to-image students can be trained as adapters", export, student, tmp_path / "out", adapters=True)
    out = export(student, tmp_path / "out")
    index = out / "model_index.json"
    index.write_text(index.read_text().replace('"epsilon"', '"sample"'))
    refused("prediction is 'sample' in model_index.json, 'epsilon' beside it", load_export, out)
    student.codec = Codec()
    refused("has a Codec for them", export, student, tmp_path / "other")

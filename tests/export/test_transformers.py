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


def test_a_model_of_classes_says_what_else_draws(tmp_path: Path) -> None:
    net = diffusers.DiTTransformer2DModel(**DiT.config)
    pipe = diffusers.DiTPipeline(net, diffusers.AutoencoderKL(**TINY_VAE), diffusers.DDIMScheduler(), {0: "cat"})
    pipe.save_pretrained(tmp_path / "dit")
    source = Transformer(str(tmp_path / "dit"))
    sampler = FewStepSampler(torch.tensor([80.0, 0.5]))
    student = TrainedStudent(source.build(), sampler, 0.5, "raw", 7, [0], {}, None, source.codec())
    refused("this student is a DiTNetwork: sample it with 'unidad sample'", export, student, tmp_path / "out")

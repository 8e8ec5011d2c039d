"""Adapters over one frozen UNet: what is shared, trained, stored and handed on."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from torch.optim.swa_utils import AveragedModel

from tests import worlds
from tests.metrics.toys import refused
from tests.tiny_sd import WIDTH, save_tiny, save_unet, subject, text_unidad
from unidad_pl import MemoryOptions, OptimizerOptions, UniDAD
from unidad_pl.backbones import LoRA, StableDiffusion, StableDiffusionUNet
from unidad_pl.backbones.lora import ATTENTION, merged
from unidad_pl.condition import Condition
from unidad_pl.data.pictures import as_uint8
from unidad_pl.export.card import model_card
from unidad_pl.export.student import export_student as export
from unidad_pl.export.student import load_export
from unidad_pl.runs.student import load_student
from unidad_pl.sampling import seeded_noise
from unidad_pl.training.networks import content_hash

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[False, True], ids=["1.x", "xl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sd") / "sd", xl=request.param)


@pytest.fixture(scope="module")
def unet_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unet(tmp_path_factory.mktemp("sd") / "sd")


def module(folder: Path, lora: LoRA | None = LoRA(rank=2), **flat: Any) -> UniDAD:  # noqa: B008
    settings = worlds.optimizers(OptimizerOptions(lr=2e-2, warmup=0))
    settings |= dict(matching__guidance_scale=3.0, training__ema_decay=0.5, student__update_every=1)
    return text_unidad(folder, lora, **(settings | flat))


def fit(model: UniDAD, photos: Path, steps: int, ckpt_path: Path | None = None, **options: Any) -> pl.Trainer:
    return worlds.fit(model, steps, subject(photos), ckpt_path, limit_val_batches=1.0, **options)


def forward(network: StableDiffusionUNet, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, cond = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, WIDTH)))
    answer: torch.Tensor = network(x, torch.tensor([1.0, 5.0]), Condition(tokens=cond))
    return answer


def adapted(folder: Path, **options: Any) -> StableDiffusionUNet:
    return StableDiffusion(str(folder), lora=LoRA(**({"rank": 2} | options))).build()


def to_q(unet: Any) -> Any:
    """A layer that has adapters."""
    return unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q


def stir(network: StableDiffusionUNet, std: float = 0.3) -> None:
    """Adapters that change something, as training would make them."""
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.normal_(std=std)


def test_untrained_adapters_change_nothing(unet_only: Path) -> None:
    assert torch.equal(forward(StableDiffusion(str(unet_only)).build()), forward(adapted(unet_only)))


def test_copies_share_the_base_and_own_their_adapters(unet_only: Path) -> None:
    network = adapted(unet_only)
    average = AveragedModel(copy.deepcopy(network))
    own, theirs = dict(network.named_parameters()), dict(average.module.named_parameters())
    shared = {name for name in own if own[name] is theirs[name]}
    assert shared == network.shared_weights
    assert {name for name in own if own[name].requires_grad} == set(own) - shared


def test_a_trained_copy_leaves_the_others_alone(unet_only: Path) -> None:
    network = adapted(unet_only)
    before = forward(network)
    stir(copy.deepcopy(network))
    assert torch.equal(forward(network), before)


def test_the_scale_is_alpha_over_rank(unet_only: Path) -> None:
    """Against the definition: the merged weight is W + alpha / rank * B A."""
    network = adapted(unet_only, alpha=6.0, target_modules=("to_q",))
    stir(network)
    layer = to_q(network.unet)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + 6.0 / 2 * b @ a
    torch.testing.assert_close(to_q(merged(network.unet)).weight, expected)


@pytest.mark.parametrize("lora", [LoRA(rank=2), LoRA(rank=5), LoRA(rank=2, target_modules=("to_q", "conv1"))])
def test_rank_and_target_modules_say_what_is_trained(unet_only: Path, lora: LoRA) -> None:
    network = StableDiffusion(str(unet_only), lora=lora).build()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    layers = {name.split(".lora_")[0].removesuffix(".0").rpartition(".")[2] for name in trained}
    assert layers == {end.removesuffix(".0") for end in lora.target_modules or ATTENTION}
    assert len(trained) % 2 == 0
    assert all(lora.rank in p.shape[:2] for p in trained.values())


def test_a_base_in_bfloat16(unet_only: Path) -> None:
    full, half = (adapted(unet_only, base_dtype=dtype) for dtype in ("float32", "bfloat16"))
    stir(half)
    forward(half).square().mean().backward()
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert half.unet.conv_in.weight.dtype == torch.bfloat16
    half.load_state_dict(full.state_dict())
    torch.testing.assert_close(forward(half), forward(full), rtol=0.05, atol=0.05)


def test_small_updates_of_a_bfloat16_base_survive_merging(unet_only: Path) -> None:
    network = adapted(unet_only, base_dtype="bfloat16")
    stir(network, 0.01)  # B A is about 1e-4, bfloat16's step at these weights about 1e-3
    layer = to_q(network.unet)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    found = to_q(merged(network.unet)).weight - layer.base_layer.weight.float()
    torch.testing.assert_close(found, update, atol=1e-7, rtol=1e-2)
    assert layer.base_layer.weight.dtype == torch.bfloat16  # the student is as it was


@pytest.mark.parametrize(
    ("name", "value"), [("rank", 0), ("alpha", 0.0), ("target_modules", ()), ("base_dtype", "float16")]
)
def test_wrong_settings_are_refused(name: str, value: Any) -> None:
    refused(name, LoRA, **{name: value})


def test_layers_that_do_not_exist_are_named(unet_only: Path) -> None:
    refused("ends in to_nowhere", adapted, unet_only, target_modules=("to_q", "to_nowhere"))


def test_the_extra_is_named_where_peft_is_missing(unet_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("unidad_pl.backbones.lora.find_spec", lambda name: None)
    refused(r"unidad_pl\[sdp\]", adapted, unet_only, error=ModuleNotFoundError)


@pytest.mark.parametrize("memory", [MemoryOptions(teacher_dtype="bfloat16"), MemoryOptions(ema_device="cpu")])
def test_a_shared_base_is_stored_in_one_way(unet_only: Path, memory: MemoryOptions) -> None:
    refused("share one base", module(unet_only, memory=memory).configure_model)


OVER = LoRA(rank=2, alpha=3.0)
ITERATIONS = 2
TRAINED = ("student", "fake_score", "target_teacher")
small = pytest.mark.parametrize("folder", [False], indirect=True, ids=["1.x"])


class Run(NamedTuple):
    """A run that several tests look at."""

    place: Path
    model: UniDAD
    base: str

    def export(self, folder: Path, adapters: bool = True) -> Path:
        return export(str(self.place / "last.ckpt"), str(folder / "out"), adapters=adapters)


def write_config(place: Path, folder: Path, **lora: Any) -> None:
    """``config.yaml`` of a run in ``place``, which export reads."""
    source = {"class_path": "unidad_pl.backbones.StableDiffusion", "init_args": {"path": str(folder), "lora": lora}}
    arguments = {"source": source, "student": {"num_steps": 2}}
    config = {"model": {"class_path": "unidad_pl.modules.UniDAD", "init_args": arguments}}
    (place / "config.yaml").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def run(folder: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("run")
    write_config(place, folder, rank=2, alpha=3)
    model = module(folder, OVER)
    model.configure_model()
    base = content_hash(model.student, model.student.shared_weights)
    fit(model, photos, ITERATIONS).save_checkpoint(place / "last.ckpt")
    return Run(place, model, base)


def test_training_moves_adapters_only(run: Run, folder: Path) -> None:
    networks = [getattr(run.model, name) for name in (*TRAINED, "source_teacher")]
    for network in networks:
        assert content_hash(network, network.shared_weights) == run.base
    plain = StableDiffusion(str(folder)).build()
    for name, weight in run.model.source_teacher.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(weight, plain.get_parameter(name.replace(".base_layer", "")))
    assert len({content_hash(network) for network in networks}) == 4
    stored = torch.load(run.place / "last.ckpt", weights_only=True)["state_dict"]
    assert {n.split(".")[0] for n in stored} == {*TRAINED, "discriminator", "ema"}
    assert all(".lora_" in n for n in stored if ".unet." in n)


@small
def test_checkpointed_blocks_give_the_same_weights(run: Run, folder: Path, photos: Path) -> None:
    """A recomputed block that used another network's adapters would not."""
    model = module(folder, OVER, memory=MemoryOptions(checkpointing="both"))
    fit(model, photos, ITERATIONS)
    for name in (*TRAINED, "discriminator"):
        assert content_hash(getattr(model, name)) == content_hash(getattr(run.model, name)), name


@small
def test_autocast_trains_every_adapter_as_float32_does(folder: Path, photos: Path) -> None:
    """Older versions of torch reuse casts made without a graph: those adapters would stay where they were."""
    mixed, exact = (module(folder, OVER) for _ in range(2))
    fit(mixed, photos, 1, precision="bf16-mixed")
    fit(exact, photos, 1)
    for name in TRAINED:
        moved, same = 0, 0
        for key, weight in getattr(mixed, name).named_parameters():
            if ".lora_B." in key:  # zero at first: Adam's first step is the gradient's sign
                signs = getattr(exact, name).get_parameter(key).sign()
                moved, same = moved + weight.numel(), same + int((weight.sign() == signs).sum())
                assert weight.any(), (name, key)
        assert same > 0.9 * moved, name


@pytest.mark.parametrize(("folder", "adapters"), [(False, False), (True, True)], indirect=["folder"], ids=["1.x", "xl"])
def test_exports_draw_the_same_images(run: Run, folder: Path, tmp_path: Path, adapters: bool) -> None:
    """Both ways through plain diffusers code: a whole pipeline, and the base with load_lora_weights."""
    out = run.export(tmp_path, adapters)
    student = load_student(run.place / "last.ckpt")
    noise = seeded_noise([5, 6], student.network.image_shape, "cpu")
    with torch.no_grad():
        prompts = student.codec.embed(["a prt dog"] * 2)
        drawn = student.sampler(student.network, noise, prompts)
        untrained = student.sampler(StableDiffusion(str(folder)).build(), noise, prompts)
        ours = as_uint8(student.codec.decode(drawn).clamp(-1, 1))
    pipe = DiffusionPipeline.from_pretrained(folder if adapters else out)
    if adapters:
        pipe.load_lora_weights(str(out))
        pipe.scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        ["a prt dog"] * 2, num_inference_steps=2, guidance_scale=1.0, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
    ).images  # fmt: skip
    shown = (torch.from_numpy(theirs).permute(0, 3, 1, 2) * 255).round().int()
    assert (ours.int() - shown).abs().max() <= 2
    assert (drawn - untrained).abs().max() > 0.05  # the adapters are not nothing


@small
def test_a_base_in_bfloat16_trains_resumes_and_exports(run: Run, folder: Path, photos: Path, tmp_path: Path) -> None:
    half = LoRA(rank=2, alpha=3, base_dtype="bfloat16")
    part, resumed, whole = (module(folder, half) for _ in range(3))
    fit(part, photos, 1).save_checkpoint(tmp_path / "part.ckpt")
    fit(resumed, photos, ITERATIONS, tmp_path / "part.ckpt")
    fit(whole, photos, ITERATIONS).save_checkpoint(tmp_path / "last.ckpt")
    assert content_hash(resumed) == content_hash(whole) != content_hash(run.model)
    write_config(tmp_path, folder, rank=2, alpha=3, base_dtype="bfloat16")
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(str(Run(tmp_path, whole, "").export(tmp_path)))
    layer, trained = to_q(pipe.unet), to_q(whole.ema.module.unet)  # type: ignore[union-attr]
    (name,) = layer.lora_A
    assert trained.lora_B["default"].weight.any()
    scale = half.alpha / half.rank  # part of the weights that are handed on
    torch.testing.assert_close(layer.lora_B[name].weight, scale * trained.lora_B["default"].weight)


@small
def test_adapters_are_no_pipeline(run: Run, tmp_path: Path) -> None:
    refused("load_lora_weights", load_export, run.export(tmp_path))


@small
def test_adapters_over_another_base_are_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other")
    network = StableDiffusion(str(other)).build()
    with torch.no_grad():
        network.unet.conv_in.weight.add_(1)
    network.unet.save_pretrained(other / "unet")
    config = (run.place / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace(str(folder), str(other)))
    refused("another one", load_student, run.place / "last.ckpt", config=str(tmp_path / "config.yaml"))


def test_weights_from_a_file(unet_only: Path, tmp_path: Path) -> None:
    """As DMD2 saves its students: diffusers' names in a torch file."""
    network = StableDiffusion(str(unet_only)).build()
    with torch.no_grad():
        network.unet.conv_in.weight.mul_(2)
    source = StableDiffusion(str(unet_only), unet_weights=str(tmp_path / "pytorch_model.bin"))
    torch.save(network.unet.state_dict(), tmp_path / "pytorch_model.bin")
    assert content_hash(source.build()) == content_hash(network)
    torch.save({"conv_in.weight": network.unet.conv_in.weight}, tmp_path / "pytorch_model.bin")
    refused(r"Missing key.*conv_out\.bias", source.build)


@small
@pytest.mark.parametrize("other", [False, True], ids=["folder", "unet_weights"])
def test_the_card_of_adapters_runs_and_names_what_they_were_trained_over(
    run: Run, folder: Path, tmp_path: Path, other: bool
) -> None:
    network, weights = StableDiffusion(str(folder)).build(), tmp_path / "pytorch_model.bin"
    student = load_student(run.place / "last.ckpt")
    if other:
        with torch.no_grad():
            network.unet.conv_in.weight.mul_(2)
        torch.save(network.unet.state_dict(), weights)
        student.config["model"]["init_args"]["source"]["init_args"]["unet_weights"] = str(weights)
    code = model_card(student, "last.ckpt", adapters=True).split("```python\n")[1].split("```")[0]
    ran: dict[str, Any] = {}
    exec(code.replace("THIS_FOLDER", str(run.export(tmp_path))), ran)
    torch.testing.assert_close(ran["pipe"].unet.conv_in.weight, network.unet.conv_in.weight)
    assert ran["pipe"].get_active_adapters()
    assert len(ran["images"]) == 1

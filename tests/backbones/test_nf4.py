"""A base in four bits: against the format's definition, and through a run. On a CPU, where the option refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from tests.backbones.test_lora import adapted, fit, forward, module, stir, to_q, write_config
from tests.metrics.toys import refused
from tests.tiny_sd import save_tiny, save_unet
from unidad_pl.backbones import LoRA, nf4
from unidad_pl.backbones.lora import merged
from unidad_pl.backbones.nf4 import BLOCK, Nf4Linear, store_in_nf4
from unidad_pl.cli.report_memory import predict_memory
from unidad_pl.export.student import export_student as export
from unidad_pl.training.networks import content_hash

pytest.importorskip("bitsandbytes")
# Quantiles of a normal distribution, as in the appendix of Dettmers et al. 2023, to four digits.
LEVELS = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
          0.7230, 1]  # fmt: skip


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "place_for", lambda weight: weight.device)


@pytest.fixture(scope="module")
def unet_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unet(tmp_path_factory.mktemp("sd") / "sd")


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_the_format_come_back_and_so_do_the_gradients(bias: bool) -> None:
    scales = torch.tensor([0.02, 1.0, 3.0, 0.5]).repeat_interleave(BLOCK).view(4, BLOCK)
    levels = torch.tensor(LEVELS)[torch.randint(16, (4, BLOCK))]
    levels[:, 0] = 1.0  # the scale is the largest of its block
    layer = nn.Linear(BLOCK, 4, bias=bias)
    layer.weight.data = levels * scales
    plain = copy.deepcopy(layer).bfloat16().float()
    store_in_nf4(nn.ModuleList([layer]))  # as in a block
    assert isinstance(layer, Nf4Linear)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.numel() == 4 * BLOCK // 2 + 4 * 4  # half a byte a weight, and four bytes a block
    torch.testing.assert_close(layer.plain().weight, levels * scales, atol=2e-4, rtol=1e-4)
    answers = []
    for one in (layer, plain):
        x = torch.linspace(-1, 1, 3 * BLOCK).view(3, BLOCK).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=one is layer):
            y = one(x)
        (y.float() * torch.tensor([1.0, -2, 0.5, 3])).sum().backward()
        answers.append((y.float(), x.grad))
    assert answers[0][1] is not None
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.02 * float(theirs.abs().max()), rtol=0)


@pytest.mark.usefixtures("without_cuda")
def test_the_base_is_near_and_a_small_part_of_its_size(unet_only: Path) -> None:
    full, half, packed = (adapted(unet_only, base_dtype=dtype) for dtype in ("float32", "bfloat16", "nf4"))
    assert {type(layer) for layer in packed.unet.mid_block.modules() if isinstance(layer, nn.Linear)} >= {Nf4Linear}
    assert type(packed.unet.time_embedding.linear_1) is nn.Linear  # outside of the blocks
    assert packed.dtype == half.dtype == torch.bfloat16
    assert 0.01 < (forward(packed) - forward(full)).std() / forward(full).std() < 0.3
    weights, stored = to_q(full.unet).base_layer.weight, to_q(packed.unet).base_layer.weight
    assert stored.numel() == weights.numel() * 9 / 16
    for network in (half, packed):
        stir(network)
        forward(network).square().mean().backward()
    trained = {name: p.grad for name, p in packed.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.dtype == torch.float32 for grad in trained.values())
    assert len(trained) == sum(p.requires_grad for p in half.parameters())


@pytest.mark.usefixtures("without_cuda")
def test_copies_share_it_and_merging_adds_to_what_was_trained_on(unet_only: Path) -> None:
    network = adapted(unet_only, base_dtype="nf4")
    twin = copy.deepcopy(network)
    assert to_q(twin.unet).base_layer.weight is to_q(network.unet).base_layer.weight
    stir(twin)
    plain = merged(twin.unet)
    assert not [layer for layer in plain.modules() if isinstance(layer, Nf4Linear)]
    layer = to_q(twin.unet)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(to_q(plain).weight, layer.base_layer.plain().weight + update)
    assert isinstance(layer.base_layer, Nf4Linear)  # the student is as it was


@pytest.mark.slow
@pytest.mark.usefixtures("without_cuda")
def test_it_trains_resumes_and_exports(photos: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "sd")
    packed = LoRA(rank=2, alpha=3, base_dtype="nf4")
    part, resumed, whole = (module(folder, packed) for _ in range(3))
    fit(part, photos, 1).save_checkpoint(tmp_path / "part.ckpt")
    fit(resumed, photos, 2, tmp_path / "part.ckpt")
    fit(whole, photos, 2).save_checkpoint(tmp_path / "last.ckpt")
    assert content_hash(resumed) == content_hash(whole)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in name for name in stored if ".unet." in name)
    write_config(tmp_path, folder, rank=2, alpha=3, base_dtype="nf4")
    out = export(str(tmp_path / "last.ckpt"), str(tmp_path / "adapters"), adapters=True)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(str(out))
    assert any("lora" in name for name, _ in pipe.unet.named_parameters())
    out = export(str(tmp_path / "last.ckpt"), str(tmp_path / "whole"))
    drawn = DiffusionPipeline.from_pretrained(out)("a prt dog", num_inference_steps=2, output_type="np").images
    assert drawn.shape[0] == 1


def test_its_memory_is_predicted_on_any_machine(unet_only: Path) -> None:
    half, packed = (
        predict_memory(module(unet_only, LoRA(rank=2, base_dtype=dtype)), 1, "bf16-mixed")
        for dtype in ("bfloat16", "nf4")
    )
    assert packed.parameters == half.parameters
    assert sum(packed.weights.values()) < 0.9 * sum(half.weights.values())  # a tiny network is mostly convolutions


def test_where_it_cannot_be_it_is_refused(unet_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("nf4 needs a CUDA device.*use bfloat16", adapted, unet_only, base_dtype="nf4")
    refused("no blocks with linear layers", store_in_nf4, nn.Sequential(nn.Linear(BLOCK, BLOCK)))
    refused("no blocks with linear layers", store_in_nf4, nn.ModuleList([nn.Linear(5, 5)]))
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    refused(r"unidad_pl\[nf4\]", adapted, unet_only, base_dtype="nf4", error=ModuleNotFoundError)

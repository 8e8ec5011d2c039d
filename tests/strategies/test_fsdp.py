"""FSDP2 (strategy ``unidad_fsdp``): two ranks with sliced networks against one process, checkpoints across both."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests import sharding_script
from tests.processes import run_apart
from tests.worlds import fit, tiny_unet, unidad
from unidad_pl import UniDAD
from unidad_pl.backbones import NewUNet
from unidad_pl.denoiser import Denoiser
from unidad_pl.runs.checkpoints import read_checkpoint
from unidad_pl.strategies.fsdp import ShardedStrategy, _blocks, full, shard_like

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sharding")
    run_apart(place, sharding_script.main, place, timeout=1800)
    return place


def compare(first: Path, second: Path, tolerance: float) -> None:
    """Weights, the average and every optimiser's moments."""
    one, other = read_checkpoint(first), read_checkpoint(second)
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert one["frozen_sha256"] == other["frozen_sha256"]
    assert one["lr_schedulers"] == other["lr_schedulers"]
    for name, value in one["state_dict"].items():
        its = other["state_dict"][name]
        torch.testing.assert_close(value, its, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for mine, its in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        assert mine["param_groups"] == its["param_groups"]
        assert mine["state"].keys() == its["state"].keys()
        for number, values in mine["state"].items():
            for name, value in values.items():
                torch.testing.assert_close(value, its["state"][number][name], atol=10 * tolerance, rtol=0)


def test_sliced_networks_train_as_whole_ones(folder: Path) -> None:
    compare(folder / "sliced" / "step=2.ckpt", folder / "whole" / "step=2.ckpt", 1e-7)
    weights = read_checkpoint(folder / "whole" / "step=2.ckpt")["state_dict"]
    start = sharding_script.make()
    start.configure_model()
    moved = [(weights[f"student.{name}"] - value).abs().max() for name, value in start.student.state_dict().items()]
    assert max(moved) > 1e-4  # they did train


def test_resumed_as_if_never_stopped(folder: Path) -> None:
    compare(folder / "sliced_resumed.ckpt", folder / "sliced" / "step=2.ckpt", 0.0)


def test_a_checkpoint_goes_on_with_another_strategy(folder: Path) -> None:
    compare(folder / "whole_resumed.ckpt", folder / "whole" / "step=2.ckpt", 1e-7)
    compare(folder / "unsliced.ckpt", folder / "sliced" / "step=2.ckpt", 1e-7)


def test_every_rank_holds_its_share(folder: Path) -> None:
    """Of all networks, frozen ones and the average included, and of the moments."""
    ranks = [json.loads((folder / f"sharded{rank}.json").read_text())["sliced"] for rank in range(2)]
    total = ranks[0]["all"]
    for name, size in total.items():
        assert ranks[0]["own"][name] + ranks[1]["own"][name] == size
    assert all(sum(rank["own"].values()) < 0.51 * sum(total.values()) for rank in ranks)
    trained = sum(size for name, size in total.items() if not name.startswith(("source_teacher", "ema")))
    assert sum(rank["moments"] for rank in ranks) < 2.01 * trained


def test_pictures_are_made_of_uneven_shares(folder: Path) -> None:
    assert len(list((folder / "run" / "samples").glob("*.png"))) == 3  # two validations and a test


def test_nan_on_one_rank_skips_that_step_on_both(folder: Path) -> None:
    for rank in range(2):
        result = json.loads((folder / f"sharded{rank}.json").read_text())["nan"]
        assert result["steps"] == [2, 3, 3]
        assert result["finite"]


def test_the_network_that_fit_exports_is_whole(folder: Path) -> None:
    weights = load_file(folder / "exported" / "diffusion_pytorch_model.safetensors")
    saved = read_checkpoint(folder / "diffusion.ckpt")["state_dict"]
    assert weights
    for name, value in weights.items():
        assert torch.equal(value, saved[f"ema.module.unet.{name}"])


def test_blocks_are_gathered_one_at_a_time() -> None:
    network = tiny_unet().build()
    kinds = [type(block).__name__ for block in _blocks(network)]
    assert kinds.count("DownBlock2D") + kinds.count("AttnDownBlock2D") == 2
    assert kinds.count("UpBlock2D") + kinds.count("AttnUpBlock2D") == 2
    in_blocks = sum(p.numel() for block in _blocks(network) for p in block.parameters())
    assert in_blocks > 0.7 * sum(p.numel() for p in network.parameters())


def test_tensors_that_are_not_sliced_stay_as_they_are() -> None:
    value = torch.ones(3)
    assert full(value) is value
    assert full("text") == "text"
    assert shard_like(value, nn.Parameter(torch.zeros(3))) is value
    assert shard_like(value, None) is value


@pytest.mark.parametrize(
    ("options", "trainer", "reason"),
    [
        ({"gan__r1": 1.0}, {}, "gan.r1"),
        ({"gan__gradient_penalty": 1.0}, {}, "gradient_penalty"),
        ({"memory__ema_device": "cpu"}, {}, "ema_device"),
        ({"memory__teacher_dtype": "bfloat16"}, {}, "teacher_dtype"),
        ({}, {"precision": "16-mixed"}, "bf16-mixed"),
    ],
)
def test_what_cannot_be_sliced_is_refused(options: dict[str, Any], trainer: dict[str, Any], reason: str) -> None:
    refused(unidad(**options), reason, **trainer)


def refused(module: UniDAD, reason: str, precision: str = "32-true") -> None:
    module._trainer = SimpleNamespace(strategy=ShardedStrategy(), precision=precision)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=f"unidad_fsdp cannot be used here: .*{reason}"):
        module.configure_model()


def test_a_base_that_networks_share_is_not_sliced() -> None:
    class Based(NewUNet):
        def build(self) -> Denoiser:
            network = super().build()
            network.shared_weights = frozenset({"unet.conv_in.weight"})
            return network

    source = Based(resolution=16, channels=(16, 24), attention_levels=(1,), head_channels=8, norm_groups=4)
    refused(UniDAD(source), "adapters")


def test_lightnings_own_model_parallel_strategy_is_refused() -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(RuntimeError, match="unidad_fsdp"):
        fit(unidad(), 1, devices=1, strategy=ModelParallelStrategy(1, 1, process_group_backend="gloo"))

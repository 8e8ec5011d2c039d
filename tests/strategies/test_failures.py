"""The strategy at its edges, and the command line on two processes; what ranks do together: test_faults.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import LAUNCHER, ROOT
from tests.worlds import fit, tiny_unet
from unidad_pl import UniDAD
from unidad_pl.strategies import ddp
from unidad_pl.strategies.ddp import ManualDDPStrategy, take_from_rank_0, tensors_elsewhere
from unidad_pl.training.stepping import average_gradients

pytestmark = pytest.mark.slow


@pytest.mark.ci
def test_a_wrapping_strategy_is_refused() -> None:
    from lightning.pytorch.strategies import DDPStrategy

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(RuntimeError, match="unidad_ddp"):
        fit(UniDAD(tiny_unet()), 1, strategy=DDPStrategy(process_group_backend="gloo"), devices=1)


@pytest.mark.ci
def test_gradients_are_left_alone_on_one_process() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0)
    average_gradients([parameter])
    assert parameter.grad.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.ci
def test_what_is_kept_on_another_device_is_found_and_takes_the_values_of_rank_0() -> None:
    """A teacher or an average on the CPU, where the other networks and the process group are a GPU's."""
    module = torch.nn.ModuleDict({"here": torch.nn.BatchNorm2d(2), "there": torch.nn.BatchNorm2d(2, device="meta")})
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    elsewhere = tensors_elsewhere(module, torch.device("cpu"))
    assert elsewhere.keys() == {f"there.{name}" for name in names}
    tensor, received = torch.zeros(2, 3), []

    def broadcast(held: torch.Tensor, source: int) -> None:
        received.append((held.device, source))
        held.add_(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "broadcast", broadcast)
        take_from_rank_0(tensor, torch.device("cpu"))
    assert received == [(torch.device("cpu"), 0)]
    assert torch.equal(tensor, torch.ones(2, 3))


@pytest.mark.ci
def test_every_fit_takes_what_is_elsewhere_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = torch.nn.ModuleDict({f"there{i}": torch.nn.Linear(1, 1, device="meta") for i in range(4)})
    module["here"] = torch.nn.Linear(1, 1)
    module._ddp_params_and_buffers_to_ignore = ["there0.weight"]
    strategy = ManualDDPStrategy(parallel_devices=[torch.device("cpu")])
    strategy._model = module
    synced: list[list[str]] = []
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(ddp, "_sync_module_states", lambda m: synced.append(m._ddp_params_and_buffers_to_ignore))
    monkeypatch.setattr(ddp, "take_from_rank_0", lambda tensor, device: taken.append(tensor))
    names = [name for name, _ in module.named_parameters() if name.startswith("there") and name != "there0.weight"]
    for _ in range(2):
        strategy.configure_ddp()
    assert [set(ignored) for ignored in synced] == 2 * [{"there0.weight", *names}]
    assert module._ddp_params_and_buffers_to_ignore == ["there0.weight"]
    assert [id(one) for one in taken] == 2 * [id(module.get_parameter(name)) for name in names]


def test_the_command_line_on_two_processes(tmp_path: Path) -> None:
    """Every seed is evaluated once, and the closing table does not wait for a rank that has left."""
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable, "-m", "unidad_pl.cli", "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"),
        "--threads", "1",
        "--trainer.strategy", "unidad_ddp", "--trainer.devices", "2", "--trainer.max_steps", "2",
        "--trainer.val_check_interval", "2", "--data.evaluation.val_samples", "12", "--data.evaluation.batch_size", "4",
        "--data.reference.root", "builtin:sunglasses:12", "--model.target_teacher.adaptation.pretrain", "1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after 2 iterations" in done.stdout
    lines = (tmp_path / "runs/quickstart/version_0/metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["samples"] for line in lines} == {12}

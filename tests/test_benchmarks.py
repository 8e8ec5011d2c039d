"""The benchmarks themselves: the plain step computes the same, and the GPU's command runs where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.benchmarks import gpu, step
from tests.benchmarks.measuring import interleaved
from tests.worlds import tiny_unet


@pytest.fixture
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_in_float64")
def test_the_plain_step_has_the_same_gradients() -> None:
    """``step --check`` says the same at the size that is measured."""
    found = step.differences(tiny_unet(prediction="epsilon"))
    assert found.keys() == {"student", "fake", "target"}
    assert max(found.values()) < 1e-10


def test_things_take_turns() -> None:
    turns: list[str] = []
    seconds = interleaved(2, a=lambda: turns.append("a"), b=lambda: turns.append("b"))
    assert turns == ["a", "b"] * 3
    assert seconds.keys() == {"a", "b"}


@pytest.mark.slow
def test_the_command_for_a_gpu_tried_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(own: gpu.Machine) -> dict[str, float]:
        raise RuntimeError("no such unit")

    monkeypatch.setattr(gpu, "matrix_products", broken)
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--tiny"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "no such unit" in found["matrix products, TFLOP/s"]["error"]
    assert found["quickstart"]["iterations"] == [2, 4]
    assert found["quickstart"]["metrics"]["val/fid"] > 0
    one = found["FFHQ-256, batch 1"]
    assert one["ms_per_iteration"] > 0
    assert one["tflops_per_iteration"] > 0
    assert len(one["slowest_kernels"]) == 10
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main(["--out", str(tmp_path)])

"""The benchmarks themselves: the plain step computes the same, and the GPU's command runs where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.benchmarks import gpu, page, sampling, scaling, step
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


def test_the_page_shows_what_was_measured_and_says_what_was_not(tmp_path: Path) -> None:
    found = {"ours": {"small": {"GFLOP": 1.23456, "CPU s": 2}, "large": {"GFLOP": 10.0}}, "ratio": 1.5}
    (tmp_path / "scaling.json").write_text(json.dumps(found | {"machine": {"processor": "a slow one", "gpu": None}}))
    text = page.page(tmp_path)
    assert "Measured with processor a slow one." in text
    assert "| ours | GFLOP | CPU s |\n|---|---|---|\n| small | 1.235 | 2 |\n| large | 10 |  |" in text
    assert "| ratio | 1.5 |" in text
    assert text.count("Not measured yet") == len(page.NAMES) - 1


def test_the_law_is_the_slope_in_logarithms() -> None:
    points = [{"GFLOP": x, "CPU s": 0.3 * x**0.8} for x in (1.0, 2.0, 8.0, 50.0)]
    assert scaling.exponent(points) == pytest.approx(0.8)


@pytest.mark.slow
def test_sampling_is_compared_with_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = sampling.measured(sampling.exported(tmp_path), images=4, batch_size=2, repetitions=1)
    assert found["ratio, wall"] == found["unidad sample, wall s"] / found["bare loop, wall s"] > 0

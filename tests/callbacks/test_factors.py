"""`FactorDistance`: closed forms with a judge that reads brightness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from tests.callbacks.toys import SIZE, Data, Toy
from unidad_pl import CartoonFeatures, FactorDistance
from unidad_pl.callbacks.outputs import Samples
from unidad_pl.cartoons.world import CATEGORIES, RANGES, factors, render


class Judge(nn.Module):
    """How bright an image is, and whether it is bright."""

    def read(self, images: Tensor) -> dict[str, Tensor]:
        brightness = images.mean((1, 2, 3))
        bright = (brightness > 0).long()
        return {"brightness": brightness, "bright": nn.functional.one_hot(bright, 2).float()}


class Grey(Toy):
    """Samples of one brightness each: seed / 100."""

    def sample(self, seeds: Tensor) -> Tensor:
        return (seeds / 100).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE).float()


def evaluate(callback: FactorDistance, place: Path, seeds: int = 20) -> Any:
    trainer = pl.Trainer(accelerator="cpu", callbacks=[callback], logger=False, default_root_dir=place,
                         enable_progress_bar=False)  # fmt: skip
    (values,) = trainer.validate(Grey(), Data(seeds=seeds), verbose=False)
    return values, json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])


def reference(*brightness: float) -> Tensor:
    return torch.tensor(brightness).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)


def test_numbers_and_categories(tmp_path: Path) -> None:
    callback = FactorDistance(["brightness", "bright"], Judge(), reference(*[i / 100 + 0.5 for i in range(-60, -40)]))
    values, record = evaluate(callback, tmp_path)
    assert values["val/distance/brightness"] == pytest.approx(0.1, abs=1e-6)  # every image by 0.1
    assert values["val/distance/bright"] == pytest.approx(19 / 20 - 9 / 20)
    assert record["floor"]["brightness"] == pytest.approx(0.01, abs=1e-6)  # every second one
    assert record["reference"] == 20
    again, _ = evaluate(callback, tmp_path)
    assert again == values


def test_one_sample_is_enough(tmp_path: Path) -> None:
    callback = FactorDistance(["brightness"], Judge(), reference(0.5, 0.5, 0.5, 0.5))
    values, _ = evaluate(callback, tmp_path, seeds=1)
    assert values["val/distance/brightness"] == pytest.approx(0.5)


def test_a_rank_without_images_splits_columns_as_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = FactorDistance(["brightness", "bright"], Judge(), reference(0.1, 0.2, 0.3, 0.4))
    monkeypatch.setattr(callback.metric, "compute", lambda: torch.zeros(5, 3))  # what all ranks have together
    assert callback._rows().shape == (5, 3)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names of one or more factors"):
        FactorDistance("glasses")
    with pytest.raises(TypeError, match="read"):
        FactorDistance(["glasses"], nn.ReLU())
    with pytest.raises(ValueError, match="reads no 'hat', only brightness, bright"):
        evaluate(FactorDistance(["hat"], Judge(), reference(0.0, 0.0, 0.0, 0.0)), tmp_path)


def test_numbers_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge()
    monkeypatch.setattr(judge, "read", lambda images: {"brightness": torch.full((len(images),), float("nan"))})
    with pytest.raises(ValueError, match="Judge reads numbers that are not finite"):
        evaluate(FactorDistance(["brightness"], judge, reference(0.1, 0.2, 0.3, 0.4)), tmp_path)


def test_shots_as_the_reference_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = FactorDistance(["brightness"], Judge(), reference(0.1, 0.2, 0.3, 0.4))
    assert "reference_is_shots" not in evaluate(callback, tmp_path)[1]
    monkeypatch.setattr(callback.reference, "are_shots", lambda trainer: True)
    assert evaluate(callback, tmp_path)[1]["reference_is_shots"] is True


def test_a_sanity_step_finds_unknown_factors(tmp_path: Path) -> None:
    callback = FactorDistance(["hat"], Judge(), reference(0.0, 0.0, 0.0, 0.0))
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.strategy.connect(Grey())
    samples = Samples(reference(0.0, 0.1), torch.arange(2), None, None, None)
    with pytest.raises(ValueError, match="reads no 'hat'"):
        callback.inspect(trainer, samples)


def test_the_cartoon_network_reads_what_was_drawn() -> None:
    index = range(20)
    read, truth = CartoonFeatures().read(render(index, "sunglasses")), factors(index, "sunglasses")
    assert set(read) >= set(CATEGORIES) | set(RANGES)
    assert (read["glasses"].argmax(1) == truth["glasses"]).all()
    low, high = RANGES["tilt"]
    assert (read["tilt"] - ((truth["tilt"] - low) / (high - low) * 2 - 1)).abs().mean() < 0.15

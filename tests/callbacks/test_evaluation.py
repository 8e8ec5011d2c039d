"""What all evaluation callbacks share: logging, records, errors, and no effect on training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

import unidad_pl.callbacks
from tests.callbacks.toys import REFERENCE, SHOTS, SIZE, Data, Judge, Plain, Toy, trainer
from tests.metrics.toys import TinyFeatures, cut_off, refused
from unidad_pl.callbacks import (
    FID,
    AttributeShare,
    EvaluationCallback,
    FactorDistance,
    IntraLPIPS,
    Report,
    SampleGrid,
    read_records,
)
from unidad_pl.callbacks.records import append_record
from unidad_pl.metrics import frechet_distance
from unidad_pl.metrics.features import extract


class Counting(EvaluationCallback):
    """Logs how many samples it saw and the last random number, which it draws."""

    def begin(self, pl_module: pl.LightningModule) -> None:
        self.found: list[int] = []

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: torch.Tensor, seeds: torch.Tensor):
        self.found += seeds.tolist()
        torch.rand(3), np.random.rand(3), random.random()

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        return Report({"count": float(len(self.found)), "broken": math.nan}, {"own": [math.inf, 1.0]})


def everything() -> list[pl.Callback]:
    return [
        FID(TinyFeatures()), IntraLPIPS(TinyFeatures(), relative=True), AttributeShare({"glasses": "dark"}, Judge()),
        SampleGrid(count=4), Counting(),
    ]  # fmt: skip


def fit(folder: Path, *callbacks: pl.Callback, module: Any = None, data: Any = None, **options: object) -> Toy:
    pl.seed_everything(0)
    module = module or Toy()
    trainer(folder, *callbacks, **options).fit(module, datamodule=data or Data())
    return module


def test_training_is_bit_equal_with_and_without(tmp_path: Path) -> None:
    bare = fit(tmp_path / "a")
    drawn = torch.rand(2), np.random.rand(2), random.random()
    watched = fit(tmp_path / "b", *everything())
    after = torch.rand(2), np.random.rand(2), random.random()
    assert torch.equal(bare.mean, watched.mean)
    assert torch.equal(drawn[0], after[0])
    assert (drawn[1] == after[1]).all()
    assert drawn[2] == after[2]
    assert watched.training == bare.training
    assert list(watched.state_dict()) == ["mean"]


def test_values_are_logged_recorded_and_usable_by_checkpoints(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="val/fid", filename="{step}", save_top_k=2)
    logger, module, data = CSVLogger(tmp_path, version="v"), Toy(), Data()
    run = trainer(tmp_path, FID(TinyFeatures()), checkpoint, enable_checkpointing=True, logger=logger)
    run.fit(module, datamodule=data)
    records = read_records(tmp_path / "lightning_logs" / "v" / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 6]
    last = records[-1]
    assert last["metric"] == "FID"
    assert (last["samples"], last["reference"], last["first_seed"], last["last_seed"]) == (24, 40, 0, 23)
    assert (last["stage"], last["extractor"], last["weights"], last["resolution"]) == ("val", "tiny", "raw", [8, 8])
    assert last["time"].endswith("+00:00")
    assert last["checkpoint"] is None
    features = TinyFeatures()
    x = extract(features, module.sample(torch.arange(24)), 100)
    y = extract(features, REFERENCE / 127.5 - 1, 100)
    assert last["values"]["fid"] == pytest.approx(frechet_distance(x, y), rel=1e-5)
    assert float(run.callback_metrics["val/fid"]) == pytest.approx(last["values"]["fid"], rel=1e-6)
    assert set(last["values"]) == {"fid", "kid", "precision", "recall", "density", "coverage"}
    assert len(checkpoint.best_k_models) == 2
    best = min(record["values"]["fid"] for record in records)
    assert min(float(v) for v in checkpoint.best_k_models.values()) == pytest.approx(best, rel=1e-6)
    run.test(module, datamodule=data, ckpt_path=checkpoint.best_model_path, verbose=False)
    tested = read_records(tmp_path / "lightning_logs" / "v" / "metrics.jsonl")[-1]
    assert tested["stage"] == "test"
    assert tested["checkpoint"] == checkpoint.best_model_path
    assert "test/fid" in run.callback_metrics


def test_sanity_check_is_skipped(tmp_path: Path) -> None:
    fit(tmp_path, Counting(), SampleGrid(), num_sanity_val_steps=2)
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [3, 6]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["val_step00000003.png", "val_step00000006.png"]


def test_several_dataloaders(tmp_path: Path) -> None:
    first, second = Counting(), Counting(dataloader_idx=1, name="second")
    run = trainer(tmp_path, first, second, FID(TinyFeatures()))
    run.validate(Toy(), datamodule=Data(loaders=2), verbose=False)
    assert len(first.found) == len(second.found) == 24
    assert {"val/fid", "val/count", "val/second_count"} <= set(run.callback_metrics)
    absent = trainer(tmp_path, Counting(dataloader_idx=2))
    message = "saw no samples in the val loop: no batch came from dataloader_idx=2"
    refused(message, absent.validate, Toy(), datamodule=Data(loaders=2), verbose=False, error=RuntimeError)


def test_stages(tmp_path: Path) -> None:
    for stages in (("val",), ("test",), ("val", "test")):
        folder = tmp_path / "-".join(stages)
        run = trainer(folder, Counting(stages=stages))
        run.validate(Toy(), datamodule=Data(), verbose=False)
        run.test(Toy(), datamodule=Data(), verbose=False)
        assert tuple(record["stage"] for record in read_records(folder / "metrics.jsonl")) == stages
    refused("stages must be some of val, test", Counting, stages=("train",))


KINDS = [kind for kind in EvaluationCallback.__subclasses__() if kind.__name__ in unidad_pl.callbacks.__all__]


@pytest.mark.parametrize("kind", KINDS)
def test_common_arguments_come_from_python_and_yaml_and_unknown_ones_are_named(kind: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=EvaluationCallback)
    needed: dict[type, dict[str, Any]] = {AttributeShare: {"wanted": {"glasses": "dark"}},
                                          FactorDistance: {"factors": ["tilt"]}}  # fmt: skip
    own = needed.get(kind, {})

    def from_yaml(**arguments: object) -> EvaluationCallback:
        config = {"class_path": f"unidad_pl.{kind.__name__}", "init_args": own | arguments}
        return parser.instantiate_classes(parser.parse_object({"callback": config})).callback

    common = {"key": "pictures", "dataloader_idx": 1, "stages": ["test"], "name": "own"}
    for made in (kind(**own, **common), from_yaml(**common)):
        assert (made.key, made.dataloader_idx, made.stages, made.name) == ("pictures", 1, ("test",), "own")
    refused("unexpected keyword argument 'stage'", kind, **own, stage="val", error=TypeError)
    refused("Option 'stage' is not accepted", from_yaml, stage="val", error=ArgumentError)


def test_seeds_default_to_a_running_count_and_repetitions_warn(tmp_path: Path) -> None:
    counting = Counting()
    trainer(tmp_path, counting).validate(Toy(extra=False), datamodule=Data(first=100), verbose=False)
    assert counting.found == list(range(24))
    assert read_records(tmp_path / "metrics.jsonl")[0]["weights"] is None

    same = Returning(lambda x: {"samples": x, "seeds": torch.zeros(len(x), dtype=torch.long)})
    with pytest.warns(UserWarning, match="23 of 24 val samples carry a seed that came before"):
        trainer(tmp_path, counting).validate(same, datamodule=Data(), verbose=False)


class Returning(Toy):
    """Returns what ``outputs`` makes of its samples."""

    def __init__(self, outputs: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def validation_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.outputs(self.sample(batch))


@pytest.mark.parametrize(("outputs", "error", "message"), [
    (lambda x: None, TypeError, "Counting: validation_step must return a dict .* 'samples', got NoneType"),
    (lambda x: {"images": x, "loss": 1}, KeyError, "no 'samples', only 'images', 'loss': return it, or set key="),
    (lambda x: {"samples": x[0]}, ValueError, r"must be a tensor \[N, 3, H, W\], .*got shape \(3, 8, 8\)"),
    (lambda x: {"samples": 2 * x.sign()}, ValueError, r"floats in \[-1, 1\], got values from -2 to 2"),
    (lambda x: {"samples": x * math.nan}, ValueError, "hold NaN in 10 of 10 images"),
    (lambda x: {"samples": x.int()}, ValueError, "got torch.int32"),
    (lambda x: {"samples": x, "seeds": [1]}, ValueError, "1 indices for 10 images"),
])  # fmt: skip
def test_wrong_outputs_are_explained(tmp_path: Path, outputs, error: type, message: str) -> None:
    run = trainer(tmp_path, Counting())
    refused(message, run.validate, Returning(outputs), datamodule=Data(), verbose=False, error=error)


def test_key_and_grey_images(tmp_path: Path) -> None:
    run = trainer(tmp_path, FID(TinyFeatures(), key="pictures"))
    run.validate(Returning(lambda x: {"pictures": x[:, :1]}), datamodule=Data(), verbose=False)
    assert "val/fid" in run.callback_metrics


@pytest.mark.parametrize("kind", [FID, IntraLPIPS])
def test_missing_weights_end_the_run_before_training(tmp_path: Path, monkeypatch: Any, kind: type) -> None:
    cut_off(monkeypatch, tmp_path)
    module = Toy()
    with pytest.raises(RuntimeError) as raised:
        fit(tmp_path, kind(), module=module)
    for part in (kind.__name__, "weights", "https://", f"{tmp_path}/hub/checkpoints/", "weights_path="):
        assert part in str(raised.value)
    assert not module.mean.any()


RELATIVE = IntraLPIPS(TinyFeatures(), shots=SHOTS, relative=True)


@pytest.mark.parametrize(("callback", "message"), [
    (FID(TinyFeatures()), "FID needs reference images, and Plain offers none .*: pass reference="),
    (IntraLPIPS(TinyFeatures()), "IntraLPIPS needs shots, and Plain offers none .*: pass shots="),
    (SampleGrid(), r"SampleGrid\(shots_on_top=True\) needs shots"),
    (RELATIVE, r"IntraLPIPS\(relative=True\) needs reference images"),
])  # fmt: skip
def test_missing_images_end_the_run_before_training(tmp_path: Path, callback: pl.Callback, message: str) -> None:
    refused(message, fit, tmp_path, callback, data=Plain())
    run, data = trainer(tmp_path, callback), Data()
    refused("there is no datamodule", run.fit, Toy(), data.train_dataloader(), data.val_dataloader())


def test_images_from_arguments(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(REFERENCE):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    runs = []
    for reference in (REFERENCE, REFERENCE / 127.5 - 1, str(folder), folder):
        callbacks = [FID(TinyFeatures(), reference=reference), IntraLPIPS(TinyFeatures(), shots=reference)]
        run = trainer(tmp_path, *callbacks, SampleGrid(shots=reference))
        run.validate(Toy(), Data().val_dataloader(), verbose=False)
        runs.append({name: float(value) for name, value in run.callback_metrics.items()})
    for other in runs[1:]:
        assert other == pytest.approx(runs[0], rel=1e-5)
    for wrong, message in (
        (str(tmp_path / "none"), "does not exist"),
        (REFERENCE[0], r"must be a tensor \[N, 3, H, W\], N >= 1, .*got shape \(3, 8, 8\)"),
        (REFERENCE.float(), r"floats in \[-1, 1\], got values from 0 to 255"),
        (REFERENCE[..., :4, :4], f"samples are {SIZE}x{SIZE} but reference images are 4x4"),
    ):
        error = FileNotFoundError if isinstance(wrong, str) else ValueError
        run = trainer(tmp_path, FID(TinyFeatures(), reference=wrong))
        refused(message, run.validate, Toy(), Data().val_dataloader(), error=error)


def test_records_survive_killed_runs_and_say_why_they_fail(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"step": 1, "stage": "val", "values": {}})
    with path.open("a") as file:
        file.write('{"half": ')
    said: list[str] = []
    assert [record["step"] for record in read_records(path, said)] == [1]
    assert said == ["metrics.jsonl: line 2 was cut short when the run was killed, and is left out"]
    fit(tmp_path, Counting())
    records = read_records(path)
    assert [record["step"] for record in records] == [1, 3, 6]
    assert records[1]["values"] == {"count": 24.0, "broken": None}  # JSON knows no NaN
    assert records[1]["own"] == [None, 1.0]
    for line in path.read_text().splitlines():
        json.loads(line)
    for end, kept in (('{"step": 7, "stage": "val", "values": {}}', [7, 8]), ("noise", [8])):  # only its end is missing
        path.write_text(end)
        append_record(path, {"step": 8, "stage": "val", "values": {}})
        assert [record["step"] for record in read_records(path, said)] == kept
    assert "line 1 cannot be used (no JSON: Expecting value)" in said[-1]
    path.unlink()
    path.mkdir()  # nothing can be written there
    refused(r"cannot write .*metrics\.jsonl \(IsADirectoryError.*resume", fit, tmp_path, Counting(), error=RuntimeError)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives(tmp_path: Path) -> None:
    found = []
    for accelerator in ("cpu", "gpu"):
        run = trainer(tmp_path / accelerator, *everything(), accelerator=accelerator)
        run.validate(Toy(), datamodule=Data(), verbose=False)
        found.append({name: float(value) for name, value in run.callback_metrics.items() if "broken" not in name})
    assert found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-3)

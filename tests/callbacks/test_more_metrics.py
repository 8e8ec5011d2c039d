"""CMMD and FID against statistics as callbacks, and pictures for MLflow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.callbacks.test_each import validate
from tests.callbacks.toys import REFERENCE, Data, Plain, Toy, trainer
from tests.metrics.test_statistics import write
from tests.metrics.toys import TinyFeatures, refused
from unidad_pl import CMMD, FID, SampleGrid
from unidad_pl.callbacks.records import read_records
from unidad_pl.callbacks.sample_grid import log_picture
from unidad_pl.metrics import frechet_distance, gaussian_mmd


def both(module: Toy) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the samples and of the reference."""
    own = TinyFeatures().eval()
    with torch.no_grad():
        return own(module.sample(torch.arange(24))), own(REFERENCE / 127.5 - 1)


def test_cmmd(tmp_path: Path) -> None:
    module = Toy()
    found = validate(tmp_path, CMMD(TinyFeatures()), module=module)
    assert found == {"cmmd": pytest.approx(gaussian_mmd(*both(module)), rel=1e-4)}
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert (record["metric"], record["reference"], record["extractor"]) == ("CMMD", 40, "tiny")
    assert (record["sigma"], record["scale"]) == (10, 1000)
    assert set(validate(tmp_path, CMMD(TinyFeatures(), name="cmmd_tiny"))) == {"cmmd_tiny"}
    assert validate(tmp_path, CMMD(TinyFeatures(), reference=REFERENCE[:9]), module=module) != found
    small = TinyFeatures()
    validate(tmp_path, CMMD(small, batch_size=4))
    assert max(small.batches) == 4


@pytest.fixture
def statistics(tmp_path: Path) -> str:
    return str(write(tmp_path, both(Toy())[1]))


def test_fid_against_statistics(tmp_path: Path, statistics: str) -> None:
    """No reference images are asked for; what made the statistics is in the record."""
    module = Toy()
    run = trainer(tmp_path, callback := FID(TinyFeatures(), reference=statistics, made_with="tiny"))
    with pytest.warns(UserWarning, match="only fid is computed") as warned:
        run.fit(module, datamodule=Plain())
    assert sum("only fid" in str(one.message) for one in warned) == 1
    assert not any("were made with" in str(one.message) for one in warned)
    assert set(run.callback_metrics) == {"val/fid"}
    last = read_records(tmp_path / "metrics.jsonl")[-1]
    assert last["values"]["fid"] == pytest.approx(frechet_distance(*both(module)), rel=1e-4)
    assert (last["statistics"], last["made_with"], last["reference"]) == (statistics, "tiny", None)
    assert callback.produces() == ["fid"]


def test_statistics_of_another_extractor(tmp_path: Path, statistics: str) -> None:
    run = trainer(tmp_path, FID(TinyFeatures(), reference=statistics, made_with="inception", kid=False, prdc=False))
    with pytest.warns(UserWarning, match="made with 'inception', the samples' features are those of 'tiny'") as warned:
        run.validate(Toy(), datamodule=Plain(), verbose=False)
    assert not any("only fid" in str(one.message) for one in warned)
    run = trainer(tmp_path, FID(TinyFeatures(width=9), reference=statistics, made_with="tiny"))
    refused("is of 8 features and 'tiny' has 9", run.validate, Toy(), datamodule=Plain())
    refused("give both or none", FID, TinyFeatures(), reference=statistics)
    refused("give both or none", FID, TinyFeatures(), reference="folder", made_with="tiny")
    absent = FID(TinyFeatures(), reference=str(tmp_path / "no.npz"), made_with="tiny")
    refused("there is no file", trainer(tmp_path, absent).fit, Toy(), datamodule=Data(), error=FileNotFoundError)


def test_one_sample_against_statistics_is_nan(tmp_path: Path, statistics: str) -> None:
    with pytest.warns(UserWarning, match="FID is NaN"):
        validate(tmp_path, FID(TinyFeatures(), reference=statistics, made_with="tiny"), seeds=1)
    assert read_records(tmp_path / "metrics.jsonl")[-1]["values"] == {"fid": None}


def test_mlflow_gets_pictures_as_its_client_takes_them() -> None:
    picture, given = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8), []

    def log_image(run_id: str, image: Any, **more: Any) -> None:
        given.append((run_id, image, more))

    logger = SimpleNamespace(run_id="7", experiment=SimpleNamespace(log_image=log_image))
    run: Any = SimpleNamespace(loggers=[logger, SimpleNamespace(experiment=SimpleNamespace())], global_step=5)
    log_picture(run, "val/samples", picture)
    ((run_id, image, more),) = given
    assert (run_id, image.shape, image.dtype) == ("7", (4, 6, 3), np.uint8)
    assert more == {"key": "val/samples", "step": 5, "synchronous": True}


@pytest.mark.slow
def test_mlflow_itself_gets_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="MLflow is optional")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("tiny", tracking_uri=f"file:{tmp_path}/mlruns")
    run = trainer(tmp_path, SampleGrid(count=4, columns=2, shots_on_top=False), logger=logger)
    run.validate(Toy(), datamodule=Data(), verbose=False)
    (file,) = tmp_path.glob("mlruns/*/*/artifacts/images/val~samples+step+0+*.png")
    written = next(tmp_path.rglob("samples/val_step00000000.png"))
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(written)))

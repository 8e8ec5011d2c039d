"""Each callback: its values, files and arguments."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from tests.callbacks.toys import REFERENCE, SHOTS, SIZE, Data, Judge, Toy, trainer
from tests.metrics.toys import TinyFeatures, images, refused
from tests.worlds import fit, unidad, weights_sha
from unidad_pl.callbacks import FID, AttributeShare, IntraLPIPS, LossBalance, PredictionWriter, SampleGrid, read_records
from unidad_pl.callbacks.sample_grid import log_picture
from unidad_pl.metrics import InceptionFeatures, IntraClusterLPIPS


def validate(folder: Path, *callbacks: object, module: Toy | None = None, **data: int) -> dict[str, float]:
    run = trainer(folder, *callbacks)
    run.validate(module or Toy(), datamodule=Data(**data), verbose=False)
    return {name.removeprefix("val/"): float(value) for name, value in run.callback_metrics.items()}


def test_fid_arguments(tmp_path: Path) -> None:
    base = validate(tmp_path, FID(TinyFeatures()))
    assert validate(tmp_path, FID(TinyFeatures(seed=1)))["fid"] != base["fid"]
    assert "kid" not in validate(tmp_path, FID(TinyFeatures(), kid=False))
    assert set(validate(tmp_path, FID(TinyFeatures(), prdc=False))) == {"fid", "kid"}
    named = validate(tmp_path, FID(TinyFeatures(), name="fid_tiny"), FID(TinyFeatures(seed=1)))
    assert {"fid_tiny", "fid_tiny_kid", "fid_tiny_recall", "fid", "kid"} <= set(named)
    features = TinyFeatures()
    assert validate(tmp_path, FID(features, batch_size=7))["fid"] == pytest.approx(base["fid"], rel=1e-5)
    assert max(features.batches) == 7
    assert validate(tmp_path, FID(TinyFeatures(), reference=REFERENCE[:20]))["fid"] != base["fid"]
    assert isinstance(FID().features, InceptionFeatures)
    refused("batch_size must be a whole number of at least 1, got 0", FID, TinyFeatures(), batch_size=0)


def test_fid_computes_the_reference_once_per_run(tmp_path: Path) -> None:
    features = TinyFeatures()
    run = trainer(tmp_path, FID(features))
    run.fit(Toy(), datamodule=Data())
    assert sum(features.batches) == 2 * 30 + len(REFERENCE)  # 24 samples in full batches of 10
    data = Data()
    data.reference = data.reference[:10]  # another run, another set
    run.validate(Toy(), datamodule=data, verbose=False)
    assert read_records(tmp_path / "metrics.jsonl")[-1]["reference"] == 10


def test_fid_of_one_image_is_nan_and_few_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="FID is NaN and all else left out: there is 1 sample, and 2 are needed"):
        found = validate(tmp_path, FID(TinyFeatures()), seeds=1)
    assert found.keys() == {"fid"}
    assert math.isnan(found["fid"])
    assert read_records(tmp_path / "metrics.jsonl")[-1]["values"] == {"fid": None}
    biased = r"FID of 24 generated against 40 .* strongly biased upwards \(advised: 25 and 25 at least\)"
    with pytest.warns(UserWarning, match=biased) as seen:
        trainer(tmp_path, FID(TinyFeatures(width=25))).fit(Toy(), datamodule=Data())
    assert len([w for w in seen if "biased" in str(w.message)]) == 1


def test_intra_lpips_equals_the_metric(tmp_path: Path) -> None:
    module = Toy()
    metric = IntraClusterLPIPS(TinyFeatures(), threshold=0.05)
    metric.set_shots(SHOTS)
    metric.update(module.sample(torch.arange(24)))
    own = metric.result()
    metric.reset()
    metric.update(REFERENCE / 127.5 - 1)
    reference, nearest = metric.result().mean, metric.result().nearest_mean
    found = validate(tmp_path, IntraLPIPS(TinyFeatures(), threshold=0.05, relative=True), module=module)
    assert found["intra_lpips"] == pytest.approx(own.mean, rel=1e-5)
    assert found["memorised"] == pytest.approx(own.memorised)
    assert found["empty_clusters"] == own.empty_clusters
    assert found["intra_lpips_relative"] == pytest.approx(own.mean / reference, rel=1e-5)
    assert found["nearest_relative"] == pytest.approx(own.nearest_mean / nearest, rel=1e-5)
    own_shots = validate(tmp_path, IntraLPIPS(TinyFeatures(), relative=True, reference=SHOTS), module=module)
    assert "nearest_relative" not in own_shots  # they are 0 away from themselves
    record = read_records(tmp_path / "metrics.jsonl")[0]
    assert (record["protocol"], record["cap"], record["shots"], record["reference"]) == ("cdc", 50, 3, 40)
    assert record["cluster_counts"] == own.cluster_counts
    assert record["intra_lpips_of_reference"] == pytest.approx(reference, rel=1e-5)


def test_intra_lpips_arguments(tmp_path: Path) -> None:
    base = validate(tmp_path, IntraLPIPS(TinyFeatures()))
    assert "intra_lpips_relative" not in base
    for options in (
        {"features": TinyFeatures(seed=1)}, {"protocol": "crdi"}, {"cap": 3}, {"shots": images(2, SIZE, seed=8)}
    ):  # fmt: skip
        changed = validate(tmp_path, IntraLPIPS(**({"features": TinyFeatures()} | options)))
        assert changed["intra_lpips"] != base["intra_lpips"], options
    assert validate(tmp_path, IntraLPIPS(TinyFeatures(), threshold=1e9))["memorised"] == 1 != base["memorised"]
    every, some = (IntraLPIPS(TinyFeatures(), relative=True, reference=own) for own in (None, REFERENCE[:20]))
    name = "intra_lpips_relative"
    assert validate(tmp_path, every)[name] != validate(tmp_path, some)[name]
    named = validate(tmp_path, IntraLPIPS(TinyFeatures(), name="intra_tiny", relative=True), IntraLPIPS(TinyFeatures()))
    assert {"intra_tiny", "intra_tiny_memorised", "intra_tiny_relative", "intra_lpips", "memorised"} <= set(named)
    features = TinyFeatures()
    validate(tmp_path, IntraLPIPS(features, batch_size=4))
    assert max(features.batches) == 4
    refused("needs a name", IntraLPIPS, TinyFeatures(), name="")
    with pytest.warns(UserWarning, match="intra_lpips is NaN: no cluster has two samples"):
        validate(tmp_path, IntraLPIPS(TinyFeatures()), seeds=1)


def test_attribute_share(tmp_path: Path) -> None:
    module = Toy()
    found = validate(tmp_path, AttributeShare({"glasses": "dark", "species": "cat"}, Judge()), module=module)
    expected = (module.sample(torch.arange(24)).mean((1, 2, 3)) > 0).double().mean()
    assert found["share/glasses=dark"] == pytest.approx(float(expected))
    assert 0 < found["share/glasses=dark"] < 1
    assert found["share/species=cat"] == 0
    hat, pink = AttributeShare({"hat": "top"}, Judge()), AttributeShare({"glasses": "pink"}, Judge())
    refused("knows no factor 'hat', only glasses, species", validate, tmp_path, hat)
    refused("factor 'glasses' has no value 'pink', only none, dark", validate, tmp_path, pink)
    refused("at least one factor", AttributeShare, {}, Judge())


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.array(opened)


def as_pixels(image: torch.Tensor) -> np.ndarray:
    return ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def shown(folder: Path, module: Toy | None = None, data: Data | None = None, **options: object) -> np.ndarray:
    """The picture of one validation."""
    trainer(folder, SampleGrid(**options)).validate(module or Toy(), datamodule=data or Data(), verbose=False)
    return picture(folder / "samples" / "val_step00000000.png")


def test_sample_grid_shows_shots_then_the_first_seeds(tmp_path: Path) -> None:
    class Backwards(Data):
        def val_dataloader(self):
            return torch.utils.data.DataLoader(list(range(23, -1, -1)), batch_size=7)

    module = Toy()
    found = shown(tmp_path, module, Backwards(), count=6, columns=4, scale=2)
    side, line = 2 * SIZE, 4
    assert found.shape == (3 * side + line, 4 * side, 3)
    samples = module.sample(torch.arange(6))
    for i in range(6):
        row, column = divmod(i, 4)
        top = side + line + row * side
        cell = found[top : top + side, column * side : (column + 1) * side]
        assert (cell[::2, ::2] == as_pixels(samples[i])).all()
        assert (cell[1::2, 1::2] == cell[::2, ::2]).all()
    assert (found[:side:2, :side:2] == as_pixels(SHOTS[0])).all()
    assert (found[side : side + line] == 255).all()
    assert (found[:side, 3 * side :] == 0).all()  # no fourth shot


def test_sample_grid_arguments(tmp_path: Path) -> None:
    def shape(**options: object) -> tuple[int, ...]:
        return shown(tmp_path / "-".join(options), **options).shape[:2]

    assert shape(count=9) == (64 * 3 + 64 + 16, 64 * 3)
    assert shape(count=9, shots_on_top=False) == (64 * 3, 64 * 3)
    assert shape(count=9, columns=9, shots_on_top=False) == (64, 64 * 9)
    assert shape(count=4, scale=1, shots_on_top=False) == (16, 16)
    assert shape(count=4, scale=1, shots=images(5, SIZE)) == (16 + 2 + 24, 16)
    assert shape() == (8 * (SIZE * (1 + 3) + 2), 8 * SIZE * 8)  # 24 samples in rows of 8, 3 shots
    trainer(tmp_path / "every", SampleGrid(every_n_evaluations=2), max_steps=12).fit(Toy(), datamodule=Data())
    names = sorted(p.name for p in (tmp_path / "every" / "samples").iterdir())
    assert names == ["val_step00000003.png", "val_step00000009.png"]
    for name in ("count", "columns", "every_n_evaluations", "scale"):
        refused(f"{name} must be a whole number of at least 1, got 0", SampleGrid, **{name: 0})


def test_sample_grid_has_a_row_for_every_class(tmp_path: Path) -> None:
    class Labelled(Toy):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, torch.Tensor]:
            return {"samples": self.sample(batch), "seeds": batch, "labels": torch.tensor([2, 0, 2])[batch % 3]}

    module, options = Labelled(), dict(count=8, scale=1, shots_on_top=False)
    found = shown(tmp_path, module, **options)
    assert found.shape == (2 * SIZE, 5 * SIZE, 3)
    rows = [[1, 4, 7], [0, 2, 3, 5, 6]]  # the seeds of class 0 and of class 2
    for row, seeds in enumerate(rows):
        for column, image in enumerate(module.sample(torch.tensor(seeds))):
            place = (slice(row * SIZE, (row + 1) * SIZE), slice(column * SIZE, (column + 1) * SIZE))
            assert (found[place] == as_pixels(image)).all()
    assert (found[:SIZE, 3 * SIZE :] == 0).all()
    assert shown(tmp_path / "fixed", module, columns=4, **options).shape == (2 * SIZE, 4 * SIZE, 3)


def test_sample_grid_goes_to_loggers(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version="v")
    shown: list[tuple[str, int]] = []
    logger.experiment.add_image = lambda tag, image, step: shown.append((tag, image.shape[0]))
    run = trainer(tmp_path, SampleGrid(), logger=logger)
    run.validate(Toy(), datamodule=Data(), verbose=False)
    assert shown == [("val/samples", 3)]
    assert (Path(logger.log_dir) / "samples" / "val_step00000000.png").is_file()
    other = SimpleNamespace(log_image=lambda key, images, step: shown.append((key, images[0].shape[-1])))
    log_picture(SimpleNamespace(loggers=[other, SimpleNamespace()], global_step=3), "t", torch.zeros(3, 2, 2))
    assert shown[-1] == ("t", 3)


def test_prediction_writer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Toy()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer(tmp_path, PredictionWriter()).predict(module, datamodule=Data(first=100))
    files = sorted((tmp_path / "predictions").iterdir())
    assert [p.name for p in files] == [f"{i:06d}.png" for i in range(100, 124)]
    assert (picture(files[3]) == as_pixels(module.sample(torch.tensor([103]))[0])).all()
    assert f"24 images are in {tmp_path / 'predictions'}" in caplog.text
    trainer(tmp_path, PredictionWriter(folder=str(tmp_path / "own"))).predict(module, datamodule=Data())
    assert len(list((tmp_path / "own").iterdir())) == 24
    other = trainer(tmp_path, PredictionWriter(key="pictures"))
    absent = "predict_step returned no 'pictures', only 'samples'"
    refused(absent, other.predict, module, datamodule=Data(), error=KeyError)
    with pytest.warns(UserWarning, match="24 of 48 images had a seed that came before"):
        trainer(tmp_path, PredictionWriter()).predict(module, datamodule=Data(loaders=2))
    (tmp_path / "file").write_text("in the way")
    blocked = trainer(tmp_path, PredictionWriter(folder=str(tmp_path / "file")))
    message = r"cannot write .*file/000000\.png \(.*choose another folder="
    refused(message, blocked.predict, module, datamodule=Data(), error=RuntimeError)


class Answering(Toy):
    """Leaves image gradients at every second step, when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.keep_image_gradients = False
        self.image_gradients: dict[str, torch.Tensor] = {}
        self.asked: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.keep_image_gradients:
            self.asked.append(self.global_step)
            if self.global_step % 2:
                self.image_gradients = {"dmd": torch.full((1, 3, 2, 2), 3.0), "gan": torch.full((1, 3, 2, 2), 1.0)}
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("every", "asked"), [(4, [0, 1, 4, 5]), (100, [0, 1])])
def test_loss_balance(tmp_path: Path, every: int, asked: list[int]) -> None:
    module = Answering()
    run = trainer(tmp_path, LossBalance(every_n_iterations=every), max_steps=7, log_every_n_steps=1)
    run.fit(module, datamodule=Data())
    assert module.asked == asked
    assert module.image_gradients == {}
    assert not module.keep_image_gradients
    assert float(run.callback_metrics["balance/dmd"]) == pytest.approx(3 * 12**0.5)
    assert float(run.callback_metrics["balance/gan_share"]) == pytest.approx(0.25)


def test_loss_balance_errors(tmp_path: Path) -> None:
    run, message = trainer(tmp_path, LossBalance()), r"keep_image_gradients and image_gradients.*Toy has none"
    refused(message, run.fit, Toy(), datamodule=Data(), error=TypeError)
    refused("every_n_iterations must be a whole number of at least 1, got 0", LossBalance, 0)


@pytest.mark.slow
def test_loss_balance_of_unidad_changes_no_weight() -> None:
    modules = [unidad(), unidad()]
    fit(modules[0], 4)
    logged = fit(modules[1], 4, callbacks=[LossBalance(every_n_iterations=3)]).callback_metrics
    assert weights_sha(modules[0]) == weights_sha(modules[1])
    shares = [float(value) for name, value in logged.items() if name.endswith("_share")]
    assert len(shares) == 3  # source, target, adversarial
    assert sum(shares) == pytest.approx(1, abs=1e-5)

"""An evaluation cannot stop a run that is well, and cannot mislead: what is too few, odd, broken or said twice."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from tests.callbacks.test_evaluation import Counting, Returning
from tests.callbacks.toys import REFERENCE, SHOTS, SIZE, Data, Judge, Prompted, Toy, trainer
from tests.metrics.toys import TinyFeatures, WordVectors, images, refused
from unidad_pl.callbacks import (
    FID,
    AttributeShare,
    IntraLPIPS,
    LossBalance,
    PredictionWriter,
    PromptDiversity,
    PromptGrid,
    SampleGrid,
    SubjectSimilarity,
    read_records,
)  # fmt: skip
from unidad_pl.callbacks.given_images import as_images

Make = Callable[..., Any]


def similarity(**options: Any) -> SubjectSimilarity:
    return SubjectSimilarity(**(dict(image_encoder=TinyFeatures(), text_encoder=WordVectors(), dino=TinyFeatures())
                                | options))  # fmt: skip


KINDS: dict[str, Make] = {
    "FID": lambda **o: FID(**{"features": TinyFeatures()} | o),
    "IntraLPIPS": lambda **o: IntraLPIPS(**{"features": TinyFeatures()} | o),
    "AttributeShare": lambda **o: AttributeShare(**{"wanted": {"glasses": "dark"}, "features": Judge()} | o),
    "SampleGrid": SampleGrid,
    "SubjectSimilarity": similarity,
    "PromptDiversity": lambda **o: PromptDiversity(**{"features": TinyFeatures()} | o),
    "PromptGrid": PromptGrid,
}
every = pytest.mark.parametrize("kind", KINDS)


def validate(
    folder: Path, *callbacks: pl.Callback, module: Any = None, data: Any = None
) -> tuple[dict[str, float], list[str]]:
    """The values of a validation, and its warnings."""
    run = trainer(folder, *callbacks)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.validate(module or Prompted(), datamodule=data or Data(), verbose=False)
    values = {name.removeprefix("val/"): float(value) for name, value in run.callback_metrics.items()}
    return values, [str(one.message) for one in seen]


def with_images(**attributes: Any) -> Data:
    data = Data()
    for name, value in attributes.items():
        setattr(data, name, value)
    return data


@pytest.mark.parametrize(("references", "samples"), [(5, 24), (40, 4), (2, 2)])
def test_precision_and_recall_of_too_few_are_left_out_with_one_warning(
    tmp_path: Path, references: int, samples: int
) -> None:
    data = Data(seeds=samples)
    data.reference = REFERENCE[:references]
    run = trainer(tmp_path, FID(TinyFeatures()))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.fit(Toy(), datamodule=data)
        run.test(run.lightning_module, datamodule=data, verbose=False)
    texts = [str(one.message) for one in seen if "left out" in str(one.message)]
    assert len(texts) == 1
    assert re.search(r"precision, recall, density and coverage are left out: they need more than 5 images", texts[0])
    assert f"{references} reference images" in texts[0]
    records = read_records(tmp_path / "metrics.jsonl")
    assert len(records) == 3
    assert all(record["values"].keys() == {"fid", "kid"} and record["values"]["fid"] > 0 for record in records)


def test_too_few_references_are_said_before_training(tmp_path: Path) -> None:
    module = Toy()
    for one in (FID(TinyFeatures(), reference=REFERENCE[:1]), FID(TinyFeatures())):
        run = trainer(tmp_path, one)
        data = with_images(reference=REFERENCE[:1])
        refused("needs at least 2 reference images, got 1", run.fit, module, datamodule=data)
    with pytest.warns(UserWarning, match=r"left out: they need more than 5 images of both kinds, and there are 5 ref"):
        FID(TinyFeatures(), reference=REFERENCE[:5]).setup(trainer(tmp_path), module, "fit")
    assert not module.mean.any()


def test_a_diversity_that_the_reference_has_not_is_left_out(tmp_path: Path) -> None:
    same = REFERENCE[:1].expand(8, -1, -1, -1)
    found, seen = validate(tmp_path, IntraLPIPS(TinyFeatures(), relative=True, reference=same))
    assert found.keys() == {"intra_lpips", "memorised", "empty_clusters", "nearest_relative"}
    assert len([text for text in seen if "intra_lpips_relative is left out: the reference images have an" in text]) == 1


def test_a_diversity_without_a_pair_of_samples_is_left_out(tmp_path: Path) -> None:
    left_out = "inter_prompt_lpips is left out: it needs samples of two prompts"
    for seeds, left in ((1, set()), (2, {"intra_prompt_lpips"})):
        found, seen = validate(tmp_path, PromptDiversity(TinyFeatures()), data=Data(seeds=seeds))
        assert found.keys() == left
        assert len([text for text in seen if left_out in text]) == 1


def test_the_record_and_the_log_say_that_the_reference_is_the_shots(tmp_path: Path) -> None:
    shots = ((SHOTS + 1) * 127.5).round().to(torch.uint8)
    data = with_images(reference=shots, reference_is_shots=True)
    _, seen = validate(tmp_path, FID(TinyFeatures()), IntraLPIPS(TinyFeatures(), relative=True), data=data)
    assert len([text for text in seen if "FID: the reference images are the shots themselves" in text]) == 1
    assert all(record["reference_is_shots"] for record in read_records(tmp_path / "metrics.jsonl"))
    _, seen = validate(tmp_path / "own", FID(TinyFeatures(), reference=REFERENCE), data=data)
    assert not [text for text in seen if "shots themselves" in text]
    assert "reference_is_shots" not in read_records(tmp_path / "own" / "metrics.jsonl")[0]


SMALL = images(3, size=4)


@pytest.mark.parametrize(("callback", "outputs", "error", "message"), [
    (Counting, lambda x: None, TypeError, "validation_step must return a dict"),
    (Counting, lambda x: {"fake": x}, KeyError, "no 'samples', only 'fake'"),
    (Counting, lambda x: {"samples": x * math.nan}, ValueError, "hold NaN in 10 of 10 images"),
    (lambda: Counting(dataloader_idx=1), lambda x: {"samples": x}, ValueError, "there are 1 val dataloaders"),
    (PromptGrid, lambda x: {"samples": x}, KeyError, "as many strings as samples under 'prompts'"),
    (similarity, lambda x: {"samples": x}, KeyError, "as many strings as samples under 'prompts'"),
    (lambda: PromptDiversity(TinyFeatures()), lambda x: {"samples": x}, KeyError, "under 'prompts'"),
    (lambda: FID(TinyFeatures(), reference=SMALL), lambda x: {"samples": x}, ValueError, "8x8 but reference .* 4x4"),
    (lambda: SampleGrid(shots=SMALL), lambda x: {"samples": x}, ValueError, "8x8 but shots are 4x4"),
    (lambda: IntraLPIPS(TinyFeatures(), shots=SMALL), lambda x: {"samples": x}, ValueError, "8x8 but shots are 4x4"),
])  # fmt: skip
def test_the_sanity_steps_check_what_a_step_returns(
    tmp_path: Path, callback: Make, outputs: Any, error: type, message: str
) -> None:
    module = Returning(outputs)
    run = trainer(tmp_path, callback(), num_sanity_val_steps=1)
    refused(message, run.fit, module, datamodule=Data(), error=error)
    assert not module.mean.any()
    assert not list(tmp_path.iterdir())


def test_a_callback_for_tests_only_asks_nothing_of_validations(tmp_path: Path) -> None:
    run = trainer(tmp_path, Counting(stages=["test"]), num_sanity_val_steps=1)
    run.fit(Returning(lambda x: None), datamodule=Data())


def test_samples_and_references_in_0_1_are_warned_of_once(tmp_path: Path) -> None:
    callbacks = [FID(TinyFeatures()), IntraLPIPS(TinyFeatures()), Counting()]
    run = trainer(tmp_path, *callbacks)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.fit(Returning(lambda x: {"samples": (x + 1) / 2}), datamodule=Data())
    assert len([one for one in seen if "no value of the 24 val samples is below 0" in str(one.message)]) == 1
    for callback, name in (
        (FID(TinyFeatures(), reference=(REFERENCE / 255)), "FID: the reference images"),
        (IntraLPIPS(TinyFeatures(), shots=(SHOTS + 1) / 2), "IntraLPIPS: the shots"),
        (similarity(photos=(SHOTS + 1) / 2), "SubjectSimilarity: the shots|photos"),
    ):
        _, seen = validate(tmp_path, callback)
        assert len([text for text in seen if re.search(f"{name}.* have no value below 0", text)]) == 1
    _, seen = validate(tmp_path, FID(TinyFeatures()))
    assert not [text for text in seen if "below 0" in text]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_given_images_are_named(tmp_path: Path, broken: float) -> None:
    wrong = SHOTS.clone()
    wrong[1, 0, 0, 0] = broken
    message = "hold NaN in 1 of 3 images" if math.isnan(broken) else "got values from .* to inf"
    for callback in (FID(TinyFeatures(), reference=wrong), IntraLPIPS(TinyFeatures(), shots=wrong),
                     SampleGrid(shots=wrong), similarity(photos=wrong)):  # fmt: skip
        refused(message, trainer(tmp_path, callback).fit, Prompted(), datamodule=Data())


PIXELS = ((images(6, SIZE, seed=3) + 1) * 127.5).round().to(torch.uint8)
FORMS: dict[str, Any] = {
    "float": PIXELS / 127.5 - 1, "double": PIXELS.double() / 127.5 - 1, "list": list(PIXELS),
    "list of floats": list(PIXELS / 127.5 - 1), "tuple": tuple(PIXELS),
    "pictures": [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in PIXELS],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_one_rule_for_samples_references_shots_and_photos(tmp_path: Path, form: str) -> None:
    def found(value: Any) -> dict[str, float]:
        callbacks = [FID(TinyFeatures(), reference=value), IntraLPIPS(TinyFeatures(), shots=value[:2]),
                     similarity(photos=value), SampleGrid(shots=value)]  # fmt: skip
        module = Returning(lambda x: {"samples": value, "prompts": ["a dog"] * 6})
        return validate(tmp_path, *callbacks, module=module, data=Data(batch=24))[0]

    want, got = found(PIXELS), found(FORMS[form])
    assert len(want) == 12
    assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert want["fid"] == pytest.approx(0, abs=1e-6)
    assert want["memorised"] > 0


def test_grey_images_count_as_colour(tmp_path: Path) -> None:
    for grey in (PIXELS[:, :1], PIXELS[:, :1] / 127.5 - 1, list(PIXELS[:, :1])):
        assert torch.equal(as_images(grey, "x")[:, 0], as_images(grey, "x")[:, 2])
    for wrong, got in (
        ([], "an empty list"), ([PIXELS[0], PIXELS[0, :1]], r"\(1, 8, 8\) torch.uint8, \(3, 8, 8\)"),
        ([PIXELS[0], PIXELS[0] / 255], "float32, .*uint8"), (PIXELS[:, :2], r"shape \(6, 2, 8, 8\)"),
        (["a.png"], "str"), (PIXELS.numpy(), "ndarray"), (PIXELS[:0], r"shape \(0"), (None, "NoneType"),
        (PIXELS.int(), "torch.int32"), (PIXELS > 9, "torch.bool"),
    ):  # fmt: skip
        refused(f"shots must be .*got.*{got}", as_images, wrong, "shots")


@every
def test_two_of_a_kind_need_two_names(tmp_path: Path, kind: str) -> None:
    make = KINDS[kind]
    run = trainer(tmp_path, make(), make())
    refused(f"{kind} and {kind} both produce .*another name=", run.fit, Prompted(), datamodule=Data())
    values, _ = validate(tmp_path, make(), make(name="own"))
    names = [name for name in values if "own" in name]
    assert len(names) == len(values) / 2
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")]
    assert len([name for name in files if "own" in name]) == len(files) / 2
    assert len(names) + len(files) > 0
    validate(tmp_path, make(stages=["val"]), make(stages=["test"]))
    for wrong in ("", " ", 3):
        refused("needs a name to log its values under", make, name=wrong)


def test_names_are_compared_over_kinds_and_where_they_are_only_known_at_the_end(tmp_path: Path) -> None:
    both = FID(TinyFeatures(), name="x", prdc=False), IntraLPIPS(TinyFeatures(), name="x")
    refused("both produce x:", trainer(tmp_path, *both).validate, Toy(), datamodule=Data())
    unknown = Counting(), Counting()  # says nothing before
    refused("both produce val/broken, val/count", trainer(tmp_path, *unknown).validate, Toy(), datamodule=Data())
    writers = PredictionWriter("a"), PredictionWriter("a")
    refused("give one of them another folder=", trainer(tmp_path, *writers).predict, Toy(), datamodule=Data())
    left = tmp_path / "predictions" / ".000001.png.0123abcd.part"  # of one that was killed
    left.parent.mkdir()
    left.write_text("half")
    trainer(tmp_path, PredictionWriter(str(tmp_path / "a")), PredictionWriter()).predict(Toy(), datamodule=Data())
    assert not left.exists()


@pytest.mark.parametrize("wrong", ["inception", TinyFeatures, lambda x: x], ids=["text", "class", "function"])
def test_what_is_no_network_is_refused_at_construction(wrong: Any) -> None:
    message = "must be a torch.nn.Module .* got"
    for make in (FID, IntraLPIPS, PromptDiversity, lambda it: AttributeShare({"a": "b"}, it)):
        refused(f"features {message}", make, wrong, error=TypeError)
    for name in ("image_encoder", "text_encoder", "dino"):
        refused(f"{name} {message}", similarity, error=TypeError, **{name: wrong})
    refused("features must have predict", AttributeShare, {"a": "b"}, TinyFeatures(), error=TypeError)


def test_a_fast_dev_run_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = [make() for make in KINDS.values()]
    run = trainer(tmp_path, *callbacks, PredictionWriter(), fast_dev_run=True)
    for name in ("fit", "validate", "test", "predict"):
        getattr(run, name)(Prompted(), datamodule=Data(batch=4))
        assert name == "predict" or any("fid" in key for key in run.callback_metrics)
    assert not list(tmp_path.rglob("*"))
    assert str(tmp_path) not in caplog.text


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_tested_checkpoint_of_any_module_records_its_own_step(tmp_path: Path, weights_only: bool) -> None:
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}",
                            save_weights_only=weights_only)  # fmt: skip
    run = trainer(tmp_path, Counting(), saved, enable_checkpointing=True)
    run.fit(Toy(), datamodule=Data())
    again = trainer(tmp_path, Counting(), SampleGrid())
    for which in (run, again):
        for step in (2, 4):
            which.test(Toy(), datamodule=Data(), ckpt_path=str(tmp_path / f"step={step}.ckpt"), verbose=False)
    run.validate(Toy(), datamodule=Data(), verbose=False)  # what is in memory: 6 steps
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [3, 6, 2, 4, 2, 4, 6]
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == [
        "test_step00000002.png", "test_step00000004.png"
    ]  # fmt: skip


def test_only_our_modules_are_asked_for_their_count(tmp_path: Path) -> None:
    class Ours(Toy):
        iteration = 77

        def iteration_kind(self) -> str:
            return "any"

    class Others(Toy):  # whatever it may mean there
        def __init__(self, iteration: Any) -> None:
            super().__init__()
            self.iteration = iteration

    for module in (Ours(), Others(77), Others(torch.ones(3)), Others(len)):
        trainer(tmp_path, Counting()).validate(module, datamodule=Data(), verbose=False)
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [77, 0, 0, 0]


@pytest.mark.parametrize("place", ["datamodule", "argument", "folder"])
def test_what_is_compared_with_is_looked_at_once(tmp_path: Path, place: str) -> None:
    folder, one, two = tmp_path / "pictures", TinyFeatures(), TinyFeatures()
    folder.mkdir()
    for i, picture in enumerate(REFERENCE):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    given = {"datamodule": None, "argument": REFERENCE, "folder": folder}[place]
    fid, intra = FID(one, reference=given), IntraLPIPS(two, relative=True, reference=given)
    run, data = trainer(tmp_path, fid, intra), Data()
    module = Toy()
    run.validate(module, datamodule=data, verbose=False)
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    assert sum(one.batches) == 4 * 30 + 40  # 24 samples in full batches of 10
    assert sum(two.batches) < 4 * (32 + 32) + 8 + 2 * 48
    if place == "datamodule":
        data.reference = data.reference.flip(0)[:20].clone()
        run.test(module, datamodule=data, verbose=False)
        assert [r["reference"] for r in read_records(tmp_path / "metrics.jsonl")][-2:] == [20, 20]
        data.reference.fill_(7)  # in place
        changed = [dict(run.callback_metrics) for _ in range(2) if run.test(module, datamodule=data, verbose=False)]
        assert changed[0]["test/fid"] == changed[1]["test/fid"]
        assert "test/intra_lpips_relative" not in changed[0]


NONSENSE = (math.nan, math.inf, -math.inf, -1, 0, 1e30, "many", None, True)
CONSTRUCTORS: list[tuple[Make, str, tuple[Any, ...]]] = [
    *((make, "dataloader_idx", (0,)) for make in KINDS.values()),
    (KINDS["FID"], "batch_size", ()), (KINDS["IntraLPIPS"], "batch_size", ()), (KINDS["IntraLPIPS"], "cap", (None,)),
    (KINDS["IntraLPIPS"], "threshold", (0, 1e30)), (similarity, "batch_size", ()),
    (KINDS["PromptDiversity"], "batch_size", ()), (SampleGrid, "count", ()), (SampleGrid, "columns", (None,)),
    (SampleGrid, "every_n_evaluations", ()), (SampleGrid, "scale", (None,)), (PromptGrid, "count", ()),
    (PromptGrid, "columns", ()), (PromptGrid, "scale", (None,)), (LossBalance, "every_n_iterations", ()),
]  # fmt: skip


@pytest.mark.parametrize(("make", "argument", "fine"), CONSTRUCTORS)
def test_nonsense_is_refused_by_name(make: Make, argument: str, fine: tuple[Any, ...]) -> None:
    for value in NONSENSE:
        if any(value is good for good in fine) or (isinstance(value, float) and value in fine):
            make(**{argument: value})
        else:
            refused(f"{argument} must be .*got", make, **{argument: value})

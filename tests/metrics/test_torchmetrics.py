"""Every metric class in all the uses that torchmetrics and Lightning have for a metric."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics.metric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection, MetricTracker, MinMaxMetric

from tests.metrics.toys import TinyFeatures, WordVectors, images, refused
from unidad_pl import metrics
from unidad_pl.metrics import (
    KID,
    PRDC,
    Frechet,
    GaussianMMD,
    IntraClusterLPIPS,
    PromptLPIPS,
    SubjectCosines,
    TwoSample,
)  # fmt: skip
from unidad_pl.metrics.similarity import PromptImages

PROMPTS = ["a dog", "a dog", "ein Hund ß", "ein Hund ß", "a dog", "ein Hund ß"]
REFERENCE, SAMPLES, SHOTS = torch.randn(9, 4), torch.randn(12, 4), images(2, seed=1)
PICTURES = images(12, seed=2)
Feed = tuple[tuple[Any, ...], dict[str, Any]]


def two_sample(kind: Callable[..., TwoSample]) -> TwoSample:
    metric = kind(keep_reference=True)
    metric.update(REFERENCE, real=True, indices=range(9))
    return metric


def subject() -> SubjectCosines:
    metric = SubjectCosines({"clip_i": TinyFeatures(), "dino": TinyFeatures(seed=4)}, WordVectors())
    metric.set_photos(SHOTS)
    return metric


def intra(spatial: bool = False, **options: Any) -> IntraClusterLPIPS:
    metric = IntraClusterLPIPS(TinyFeatures(spatial=spatial), **options)
    metric.set_shots(SHOTS)
    return metric


MAKERS: dict[str, Callable[[], Any]] = {
    "Frechet": lambda: two_sample(Frechet),
    "KID": lambda: two_sample(KID),
    "GaussianMMD": lambda: two_sample(GaussianMMD),
    "PRDC": lambda: two_sample(lambda **options: PRDC(neighbours=2, **options)),
    "TwoSample": lambda: two_sample(TwoSample),
    "IntraClusterLPIPS": intra,
    "IntraClusterLPIPS of pictures": lambda: intra(spatial=True),
    "SubjectCosines": subject,
    "PromptLPIPS": lambda: PromptLPIPS(TinyFeatures()),
    "PromptImages": PromptImages,
}
SINGLE = ("Frechet", "KID", "GaussianMMD", "IntraClusterLPIPS", "IntraClusterLPIPS of pictures")
SEVERAL = ("PRDC", "SubjectCosines", "PromptLPIPS")


def feed(name: str, part: int, given: bool = False) -> Feed:
    """Arguments of ``update`` for half of the samples, with or without their numbers."""
    rows = slice(6 * part, 6 * part + 6)
    options: dict[str, Any] = {"indices": torch.arange(12)[rows]} if given else {}
    if isinstance(MAKERS[name](), TwoSample):
        return (SAMPLES[rows],), {"real": False} | options
    return (PICTURES[rows], *([PROMPTS] if "Prompt" in name or "Subject" in name else [])), options


def updated(name: str, *parts: int, given: bool = False) -> Metric:
    metric = MAKERS[name]()
    for part in parts:
        arguments, options = feed(name, part, given)
        metric.update(*arguments, **options)
    return metric


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-9, equal_nan=True))


def flat(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values()))


every = pytest.mark.parametrize("name", MAKERS)


def test_every_metric_class_is_tried() -> None:
    classes = {name for name in metrics.__all__ if isinstance(made := getattr(metrics, name), type)
               and issubclass(made, Metric)}  # fmt: skip
    assert classes <= set(MAKERS)


@every
def test_values_are_tensors_and_say_which_way_is_better(name: str) -> None:
    metric = updated(name, 0, 1)
    value = metric.compute()
    assert flat(value)
    assert metric.full_state_update is not None
    assert metric.is_differentiable is False
    if name in SINGLE + SEVERAL:
        assert isinstance(metric.higher_is_better, bool)
        assert all(one.ndim == 0 for one in (value.values() if isinstance(value, dict) else [value]))


@every
def test_forward_gives_the_batch_and_loses_nothing(name: str) -> None:
    metric = MAKERS[name]()
    for part in (0, 1):
        arguments, options = feed(name, part)
        of_batch = metric(*arguments, **options)
        assert same(of_batch, updated(name, part).compute())
    assert same(metric.compute(), updated(name, 0, 1).compute())


@every
@pytest.mark.parametrize("given", [False, True])
def test_merged_states_are_as_good_as_one(name: str, given: bool) -> None:
    want = updated(name, 0, 1, given=given).compute()
    first = updated(name, 0, given=given)
    first.compute()
    first.merge_state(updated(name, 1, given=given))
    assert same(first.compute(), want)
    by_state = updated(name, 0, given=given)
    by_state.merge_state(updated(name, 1, given=given).metric_state)
    assert same(by_state.compute(), first.compute())
    refused("cannot take in the state of a MeanMetric", first.merge_state, torchmetrics.MeanMetric())
    refused("cannot take in a state without", first.merge_state, {})
    if name != "PromptImages":
        refused("give indices in every update or in none", first.merge_state, updated(name, 1, given=not given))


@every
def test_states_come_back_from_a_file(name: str, tmp_path: Path) -> None:
    metric = updated(name, 0)
    assert not metric.state_dict().keys() & metric.metric_state.keys()
    metric.persistent(True)
    torch.save(metric.state_dict(), tmp_path / "metric.pt")
    other = MAKERS[name]()
    other.persistent(True)
    other.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    arguments, options = feed(name, 1)
    other.update(*arguments, **options)
    assert same(other.compute(), updated(name, 0, 1).compute())


@every
def test_copies_go_their_own_way(name: str) -> None:
    metric, want = updated(name, 0), updated(name, 0).compute()
    arguments, options = feed(name, 1)
    copies = [metric.clone(), pickle.loads(pickle.dumps(metric)), metric.to("cpu").clone()]
    for copy in copies:
        copy.update(*arguments, **options)
        assert same(copy.compute(), updated(name, 0, 1).compute())
    assert same(metric.compute(), want)
    metric.reset()
    metric.update(*arguments, **options)
    assert same(metric.compute(), updated(name, 1).compute())


@pytest.mark.parametrize("name", ["Frechet", "KID", "PRDC", "TwoSample"])
@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_another_precision_of_values_leaves_numbers_whole(name: str, kind: torch.dtype) -> None:
    metric = updated(name, 0)
    metric.set_dtype(kind)
    arguments, options = feed(name, 1)
    metric.update(*arguments, **options)
    if kind == torch.float64:
        assert same(metric.compute(), updated(name, 0, 1).compute())
    assert metric.generated_index[0].dtype == torch.long
    assert metric.generated[0].dtype == kind


@every
def test_no_samples_is_an_error_that_says_so(name: str) -> None:
    metric = MAKERS[name]()
    if name == "TwoSample":
        metric.forget_reference()
    refused("no samples|at least . generated", metric.compute)
    metric.update(*feed(name, 0)[0], **feed(name, 0)[1])
    metric.compute()  # and it goes on


@every
def test_numbers_are_given_always_or_never(name: str) -> None:
    for given in (False, True):
        metric = updated(name, 0, given=given)
        arguments, options = feed(name, 1, given=not given)
        refused("give indices in every update or in none", metric.update, *arguments, **options)
        assert same(metric.compute(), updated(name, 0).compute())  # nothing was added
        metric.reset()
        metric.update(*arguments, **options)
    refused("6 images|3 indices", metric.update, *arguments, **feed(name, 0)[1] | {"indices": [1, 2, 3]})
    refused("indices must be below", metric.update, *arguments, **feed(name, 0)[1] | {"indices": [2**62] * 6})


@every
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_nan_is_named_by_the_metric_itself(name: str, broken: float) -> None:
    metric = updated(name, 0)
    (first, *others), options = feed(name, 1)
    first = first.clone()
    first[2].flatten()[1] = broken
    refused("NaN" if math.isnan(broken) else "infinite|to inf", metric.update, first, *others, **options)
    assert same(metric.compute(), updated(name, 0).compute())


@pytest.mark.parametrize("name", SINGLE + SEVERAL)
def test_wrappers_and_arithmetic(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = updated(name, 0, 1).compute()
    key = next(iter(want)) if name in SEVERAL else None
    picked = MAKERS[name]() if key is None else MAKERS[name]()[key]  # one value of a metric that has several
    want = want if key is None else want[key]
    plus, minmax = picked.clone() + 1, MinMaxMetric(picked.clone() * 2)
    tracker, collection = MetricTracker(MAKERS[name](), maximize=True), MetricCollection({"own": MAKERS[name]()})
    for part in (0, 1):
        arguments, options = feed(name, part)
        for metric in (plus, minmax, collection):
            metric.update(*arguments, **options)
        tracker.increment()
        tracker(*arguments, **options)
    assert same(plus.compute(), want + 1)
    assert same(minmax.compute()["raw"], want * 2)
    assert flat(collection.compute())
    assert same(collection.compute()[key or "own"], want)
    assert flat(tracker.compute_all())
    assert tracker.n_steps == 2
    plotted: list[Any] = []
    monkeypatch.setattr(torchmetrics.metric, "plot_single_or_multi_val", lambda val, **_: (plotted.append(val), None))
    updated(name, 0, 1).plot()
    assert same(plotted[0], updated(name, 0, 1).compute())


def test_a_collection_shares_states_only_where_they_stay_equal() -> None:
    kinds = {"fid": Frechet(), "kid": KID(), "prdc": PRDC(neighbours=2)}
    intras = {"two": intra(cap=2), "many": intra(cap=50), "crdi": intra(protocol="crdi")}
    features, pictures = MetricCollection(kinds), MetricCollection(intras)
    features.update(REFERENCE, real=True)
    for part in (0, 1):
        features.update(SAMPLES[6 * part : 6 * part + 6], real=False)
    for start in range(0, 12, 2):
        pictures.update(PICTURES[start : start + 2])
    assert len(features.compute_groups) == 1
    assert len(pictures.compute_groups) == 3
    found = features.compute()
    assert same(found["fid"], updated("Frechet", 0, 1).compute())
    assert same(found["recall"], updated("PRDC", 0, 1).compute()["recall"])
    alone = intra(cap=2)
    alone.update(PICTURES)
    assert same(pictures.compute()["two"], alone.compute())
    assert same(pictures.compute()["many"], updated("IntraClusterLPIPS", 0, 1).compute())


class Logging(pl.LightningModule):
    """Logs a metric in the ways Lightning has."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.metric, self.collection = name, MAKERS[name](), MetricCollection({"own": MAKERS[name]()})
        self.collected = nn.ModuleList([self.collection])

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        arguments, options = feed(self.name, batch_idx)
        self.metric.update(*arguments, **options)
        self.collection.update(*arguments, **options)
        if self.name in SINGLE:
            self.log("metric", self.metric, on_epoch=True)
            self.log_dict({"mapped": self.metric}, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.collection.compute())
        self.collection.reset()


@pytest.mark.parametrize("name", SINGLE + SEVERAL)
def test_lightning_logs_them(name: str, tmp_path: Path) -> None:
    run = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    run.validate(Logging(name), DataLoader([0, 1]), verbose=False)
    want = updated(name, 0, 1).compute()
    for key, value in want.items() if isinstance(want, dict) else [(k, want) for k in ("own", "metric", "mapped")]:
        assert float(run.callback_metrics[key]) == pytest.approx(float(value), rel=1e-5)


NONSENSE = (float("nan"), float("inf"), float("-inf"), -1, 0, 1e30, "many", None)
CONSTRUCTORS: list[tuple[Callable[..., Any], str, set[Any]]] = [
    (PRDC, "neighbours", set()), (KID, "subsets", set()), (KID, "subset_size", set()), (KID, "seed", {0}),
    (lambda **o: IntraClusterLPIPS(TinyFeatures(), **o), "cap", {None}),
    (lambda **o: IntraClusterLPIPS(TinyFeatures(), **o), "threshold", {0, 1e30}),
    (lambda **o: IntraClusterLPIPS(TinyFeatures(), **o), "batch_size", set()),
    (lambda **o: PromptLPIPS(TinyFeatures(), **o), "batch_size", set()),
    (lambda **o: SubjectCosines({"a": TinyFeatures()}, **o), "batch_size", set()),
]  # fmt: skip


@pytest.mark.parametrize(("make", "argument", "fine"), CONSTRUCTORS)
def test_nonsense_is_refused_by_name(make: Callable[..., Any], argument: str, fine: set[Any]) -> None:
    for value in NONSENSE:
        if value in fine:
            make(**{argument: value})
        else:
            refused(f"{argument} must be .*got", make, **{argument: value})


def test_what_is_no_network_is_refused_at_construction() -> None:
    for wrong, got in (("inception", "'inception'"), (TinyFeatures, "the class TinyFeatures: call it"), (len, "len")):
        makers: list[tuple[str, Callable[[Any], Any]]] = [
            ("features", IntraClusterLPIPS), ("features", PromptLPIPS),
            ("dino", lambda it: SubjectCosines({"dino": it})),
            ("text_encoder", lambda it: SubjectCosines({"clip_i": TinyFeatures()}, it)),
        ]  # fmt: skip
        for name, make in makers:
            refused(f"{name} must be a torch.nn.Module .* got .*{got}", make, wrong, error=TypeError)


def test_a_network_that_returns_no_features_is_named() -> None:
    for network, message in (
        (nn.Identity(), r"Identity must return features \[N, D\] of 8 images, got shape \(8, 3, 8, 8\)"),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, -1))), r"Sequential must .* of 8 images, got shape \(1, "),
        (nn.Sequential(nn.Flatten(), nn.Softmax(1), nn.Threshold(9, math.nan)), "Sequential returned NaN or infinite"),
    ):
        refused(message, IntraClusterLPIPS(network).set_shots, SHOTS)

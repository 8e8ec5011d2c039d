"""Frechet, KID and PRDC against torch-fidelity, closed forms and literal loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from tests.metrics.toys import refused
from unidad_pl.metrics import KID, PRDC, Frechet, TwoSample, frechet_distance, gaussian_mmd, kernel, kid
from unidad_pl.metrics.prdc import prdc


def features(n: int, d: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator) / d**0.5
    return torch.randn(n, d, generator=generator) @ mix + shift


def fidelity_fid(x: torch.Tensor, y: torch.Tensor) -> float:
    statistics = [fid_features_to_statistics(part.double()) for part in (x, y)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])


@pytest.mark.parametrize(("n", "m", "tolerance"), [(200, 150, 1e-9), (20, 200, 1e-4), (10, 12, 1e-4)])
def test_frechet_equals_torch_fidelity(n: int, m: int, tolerance: float) -> None:
    x, y = features(n, 32, 1), features(m, 32, 2, shift=0.3)
    assert frechet_distance(x, y) == pytest.approx(fidelity_fid(x, y), abs=tolerance)


def test_frechet_of_gaussians_in_closed_form() -> None:
    # Whitened samples have exactly the mean and covariance that is then given to them.
    z = features(500, 4).double()
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    a, b = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 1.0, 0.0, 3.0]).double()
    expected = float(((a - b) ** 2).sum() + 4 * 0.7**2)
    assert frechet_distance(z * a, z * b + 0.7) == pytest.approx(expected, rel=1e-12)


def test_frechet_is_exact_for_rank_deficient_covariances() -> None:
    x = features(300, 16).double()
    x[:, 8:] = 0  # features that never fire: a singular covariance although n > D
    y = x.flip(0) + torch.cat([torch.full((8,), 0.5), torch.zeros(8)])
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, y) == pytest.approx(8 * 0.25, rel=1e-12)
    few = features(6, 64).double()
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("size", [8, 40, 1000])  # each subset for itself; one matrix of all, twice
def test_kid_equals_torch_fidelity(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "ROWS", 32)  # several blocks
    x, y = features(60, 16, 1), features(80, 16, 2, shift=0.2)
    options = dict(kid_subsets=7, kid_subset_size=min(size, 60), rng_seed=3, verbose=False)
    expected = kid_features_to_metric(x.double(), y.double(), **options)
    mean, std = kid(x, y, subsets=7, subset_size=size, seed=3)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)


def test_kid_is_unbiased_and_each_argument_counts() -> None:
    draws = [kid(features(40, 8, 2 * s)[:20], features(40, 8, 2 * s)[20:])[0] for s in range(200)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 200**0.5
    x, y = features(30, 8, 1), features(50, 8, 2, shift=0.3)
    values = {kid(x, y), kid(x, y, subsets=3), kid(x, y, subset_size=10), kid(x, y, seed=1)}
    assert len(values) == 4


def test_precision_and_recall_equal_torch_fidelity() -> None:
    x, y = features(90, 6, 1, shift=0.4), features(120, 6, 2)
    options = dict(prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    for neighbours in (3, 5):
        expected = prc_features_to_metric(x.double(), y.double(), prc_neighborhood=neighbours, **options)
        found = prdc(x, y, neighbours)
        for name in ("precision", "recall"):
            assert found[name] == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize("rows", [7, 1024])
def test_gaussian_mmd_is_cmmds(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the kernel matrices themselves; by steps of one, and of some rows at a time."""
    monkeypatch.setattr(kernel, "ROWS", rows)
    x, y = features(20, 6, 1), features(33, 6, 2, shift=0.3)

    def plain(sigma: float) -> float:
        unit = [part.double().numpy() / np.linalg.norm(part.double().numpy(), axis=1, keepdims=True) for part in (x, y)]
        k = [[np.exp(-np.square(a[:, None] - b[None]).sum(2) / (2 * sigma**2)).mean() for b in unit] for a in unit]
        return k[0][0] + k[1][1] - 2 * k[0][1]

    assert gaussian_mmd(x, y) == pytest.approx(1000 * plain(10), rel=1e-9)
    assert gaussian_mmd(x, y, sigma=2, scale=1) == pytest.approx(plain(2), rel=1e-9)
    assert gaussian_mmd(8 * x, y) == pytest.approx(gaussian_mmd(x, y), rel=1e-9)
    assert gaussian_mmd(x, x) == pytest.approx(0, abs=1e-12)
    refused("sigma must be above 0, got 0", gaussian_mmd, x, y, sigma=0)


def plain_prdc(x: torch.Tensor, y: torch.Tensor, k: int) -> dict[str, float]:
    """By all differences in float64; equal distances are outside, however they are rounded."""
    x, y = x.double(), y.double()
    between, among_x, among_y = ((a[:, None] - b[None]).norm(dim=2) for a, b in ((x, y), (x, x), (y, y)))
    radii_x, radii_y = ((1 - 1e-9) ** 0.5 * among.sort(1).values[:, k] for among in (among_x, among_y))
    inside = between < radii_y
    return {
        "precision": float(inside.any(1).double().mean()), "density": float(inside.double().sum(1).mean() / k),
        "recall": float((between < radii_x[:, None]).any(0).double().mean()),
        "coverage": float(inside.any(0).double().mean()),
    }  # fmt: skip


def far_off(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.new_full((1, x.shape[1]), 1e6)])


@pytest.mark.parametrize("rows", [7, 512])
@pytest.mark.parametrize("kind", ["plain", "copies", "collapsed", "all alike", "near", "far off", "huge", "tiny"])
def test_prdc_equals_its_definition(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float32 cannot tell distances apart, too."""
    monkeypatch.setitem(prdc.__globals__, "ROWS", rows)
    x, y = features(40, 3, 1), features(30, 3, 2)
    x, y = {
        "plain": (x, y), "copies": (torch.cat([y[:20], x]), y), "collapsed": (x[:1] + 1e-9 * x.double(), y),
        "all alike": (x[:1].expand(9, 3), x[:1].expand(8, 3)), "near": (1e-6 * x + 1, 1e-6 * y + 1),
        "far off": (far_off(x), far_off(y)), "huge": (1e25 * x, 1e25 * y), "tiny": (1e-25 * x, 1e-25 * y),
    }[kind]  # fmt: skip
    for k in (1, 4):
        assert prdc(x, y, k) == pytest.approx(plain_prdc(x, y, k), abs=1e-12)


def test_prdc_of_many_copies_of_one_picture() -> None:
    """Their balls have no size: a copy is inside none, however its distance is rounded."""
    for seed in range(4, 12):
        g = torch.Generator().manual_seed(seed)
        point = torch.randn(1, 8, generator=g)
        y = torch.cat([point.expand(20, -1), torch.randn(80, 8, generator=g)])
        x = torch.cat([point.expand(50, -1), torch.randn(50, 8, generator=g)])
        assert prdc(x, y, 5) == pytest.approx(plain_prdc(x, y, 5), abs=1e-12)


def test_prdc_does_not_depend_on_what_torch_takes_for_float32() -> None:
    x, y = features(60, 64, 1), features(50, 64, 2)
    expected = prdc(x, y, 3)
    torch.set_float32_matmul_precision("medium")
    try:
        assert prdc(x, y, 3) == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_no_distance_is_on_the_wrong_side_of_a_radius() -> None:
    """Of two rows whose distances float32 rounds to the same, in 300 dimensions."""
    base = features(50, 300, 1).double()
    x, y = base + 1e-6 * features(50, 300, 2), base
    assert prdc(x, y, 2) == pytest.approx(plain_prdc(x, y, 2), abs=1e-12)


def test_metric_classes_use_the_pure_functions_and_their_arguments() -> None:
    x, y = features(30, 4, 1), features(25, 4, 2)
    metrics = [Frechet(), KID(), KID(subsets=2), KID(subset_size=10), KID(seed=1), PRDC(), PRDC(neighbours=2)]
    for metric in metrics:
        for part in y.split(10):
            metric.update(part, real=True)
        for part in x.split(7):
            metric.update(part, real=False)
    expected = [
        frechet_distance(x, y), kid(x, y)[0], kid(x, y, 2)[0], kid(x, y, 100, 10)[0], kid(x, y, seed=1)[0],
        prdc(x, y), prdc(x, y, 2),
    ]  # fmt: skip
    assert [metric.compute() for metric in metrics] == expected
    assert len({str(value) for value in expected}) == len(expected)


def test_samples_are_put_in_order_and_counted_once() -> None:
    x = features(10, 3)
    metric = TwoSample()
    metric.update(x[5:], real=False, indices=range(5, 10))
    metric.update(x[:6], real=False, indices=range(6))
    metric.update(x[:4], real=True)
    found = metric.compute()
    assert torch.equal(found["generated"], x)
    assert torch.equal(found["reference"], x[:4])


def test_reset_keeps_the_reference_only_when_asked() -> None:
    x = features(6, 3)
    for keep, left in ((True, 6), (False, 0)):
        metric = TwoSample(keep_reference=keep)
        metric.update(x, real=True)
        metric.update(x, real=False)
        metric.reset()
        assert metric.count("reference") == left
        assert metric.count("generated") == 0


def test_errors_name_what_was_seen() -> None:
    x = features(5, 3)
    refused("got 5 and 1", frechet_distance, x, x[:1])
    refused(r"\(5, 3\) and \(5, 2\)", frechet_distance, x, x[:, :2])
    refused("at least 6 generated", prdc, x, x)
    refused("neighbours must be a whole number of at least 1, got 0", prdc, x, x, 0)
    refused("subset_size must be a whole number of at least 2, got 1", kid, x, x, subset_size=1)
    metric = TwoSample()
    metric.update(x, real=True)
    refused(r"D=2, earlier ones D=\{3\}", metric.update, x[:, :2], real=False)
    refused("NaN", metric.update, x * float("nan"), real=False)
    refused("3 indices for 5 images", metric.update, x, real=False, indices=[1, 2, 3])
    refused(r"must be floats \[N, D\]", metric.update, x[0], real=False)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_features_give_no_number(broken: float) -> None:
    x, wrong = features(9, 3), features(9, 3)
    wrong[4, 1] = broken
    for function in (frechet_distance, kid, prdc):
        refused("generated features hold NaN or infinite", function, wrong, x)
        refused("reference features hold NaN or infinite", function, x, wrong)

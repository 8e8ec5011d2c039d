"""Intra-LPIPS against literal loops over ``lpips.LPIPS``."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.metrics.toys import TinyFeatures, images, refused
from unidad_pl.metrics import IntraClusterLPIPS, LPIPSFeatures, intra_lpips
from unidad_pl.metrics.intra_lpips import first_per_cluster, mean_pairwise_distance


def textured(count: int, size: int, seed: int) -> Tensor:
    """Smooth coloured patterns, which a random backbone tells apart better than noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return (smooth + 0.1 * torch.randn(count, 3, size, size, generator=generator)).clamp(-1, 1)


def with_shots(shots: Tensor, **options: Any) -> IntraClusterLPIPS:
    metric = IntraClusterLPIPS(**({"features": TinyFeatures()} | options))
    metric.set_shots(shots)
    return metric


def literal(distance, shots: Tensor, samples: Tensor, protocol: str, cap: int) -> tuple[float, list[float], list[int]]:
    """The protocols as their authors' code runs them: one pair at a time."""
    fed = samples if protocol == "cdc" else (samples + 1) / 2
    clusters: list[list[int]] = [[] for _ in shots]
    for i, sample in enumerate(fed):
        near = min(range(len(shots)), key=lambda k: distance(sample[None], shots[k : k + 1]))
        clusters[near].append(i)
    counts = [len(members[:cap]) for members in clusters]
    means = []
    for members in clusters:
        pairs = [distance(fed[i : i + 1], fed[j : j + 1]) for i, j in combinations(members[:cap], 2)]
        means.append(sum(pairs) / len(pairs) if pairs else math.nan)
    if protocol == "cdc":
        valid = [m for m in means if not math.isnan(m)]
        return sum(valid) / len(valid), means, counts
    return sum(0 if math.isnan(m) else m for m in means) / len(means), means, counts


@pytest.mark.parametrize(("net", "size"), [("vgg", 16), ("alex", 64), ("squeeze", 64)])
def test_features_give_lpips(net: str, size: int) -> None:
    import lpips

    features = LPIPSFeatures(net, pnet_rand=True)
    features.load()
    torch.manual_seed(0)  # the seed of the random backbone
    official = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    x, y = textured(4, size, 1), textured(4, size, 2)
    with torch.no_grad():
        expected = official(x, y).flatten()
        found = (features(x) - features(y)).square().sum(1)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("protocol", ["cdc", "crdi"])
@pytest.mark.parametrize("cap", [2, None])
def test_equals_the_literal_loops(protocol: str, cap: int | None) -> None:
    import lpips

    torch.manual_seed(0)
    official = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    shots = textured(4, 64, 3)
    samples = (0.7 * shots[torch.tensor([0, 1, 0, 1, 2, 0, 1, 0])] + 0.3 * textured(8, 64, 4)).clamp(-1, 1)
    alex = LPIPSFeatures("alex", pnet_rand=True)
    metric = with_shots(shots, features=alex, protocol=protocol, cap=cap, batch_size=3)
    metric.update(samples[:5], range(5))
    metric.update(samples[5:], range(5, 8))
    result = metric.result()
    with torch.no_grad():
        mean, means, counts = literal(lambda x, y: float(official(x, y)), shots, samples, protocol, metric.cap)
    assert result.mean == pytest.approx(mean, abs=1e-7)
    assert result.cluster_means == pytest.approx(means, abs=1e-7, nan_ok=True)
    assert result.cluster_counts == counts
    assert result.empty_clusters == counts.count(0) > 0
    assert result.single_clusters == counts.count(1)
    assert sum(result.cluster_sizes) == 8
    assert result.mean_with_empty_as_zero == pytest.approx(sum(m for m in means if not math.isnan(m)) / 4, abs=1e-7)


@pytest.mark.parametrize("spatial", [False, True])  # keeps features, or images because features are larger
def test_does_not_depend_on_batches_or_order(spatial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intra_lpips, "KEPT_BYTES", 0)
    shots, samples = images(3, seed=1), images(40, seed=2)
    results = []
    for order, size in ((torch.arange(40), 40), (torch.arange(40).flip(0), 7), (torch.randperm(40), 1)):
        metric = with_shots(shots, features=TinyFeatures(spatial=spatial), cap=4, batch_size=5)
        assert metric._keeps_features is not spatial
        for part in order.split(size):
            metric.update(samples[part], part)
        assert metric.count("kept") <= 3 * 4
        results.append(metric.result())
    for other in results[1:]:
        assert other.mean == pytest.approx(results[0].mean, rel=1e-6)
        assert other.cluster_counts == results[0].cluster_counts
    assert max(results[0].cluster_counts) == 4


def test_repeated_numbers_count_once_and_reset_forgets() -> None:
    samples, metric = images(12, seed=2), with_shots(images(2, seed=1), cap=3)
    metric.update(samples)
    once = vars(metric.result()) | {"cluster_means": pytest.approx(metric.result().cluster_means, nan_ok=True)}
    metric.reset()
    metric.update(samples[:6], range(6))
    metric.update(samples[:6], range(6))
    metric.update(samples[6:], range(6, 12))
    assert vars(metric.result()) == once
    assert torch.isnan(metric(samples[:1], [99]))  # one sample alone has no diversity
    assert sum(metric.result().cluster_sizes) == 13


def test_every_argument_counts() -> None:
    shots, samples = images(3, seed=1), images(120, seed=2)

    def value(**options: object) -> IntraClusterLPIPS:
        metric = with_shots(shots, **options)
        metric.update(samples)
        return metric

    base = value().result()
    assert max(base.cluster_counts) <= 50
    assert max(value(protocol="crdi").result().cluster_counts) > 50  # its default cap is 100
    assert value(protocol="crdi", cap=50).result().mean != base.mean
    assert value(cap=5).result().mean != base.mean
    assert value(features=TinyFeatures(seed=1)).result().mean != base.mean
    low, high = value(threshold=base.nearest_min).result(), value(threshold=1e9).result()
    assert (low.memorised, high.memorised) == (0.0, 1.0)
    assert set(value(batch_size=3).features.batches[1:]) == {3}
    assert isinstance(IntraClusterLPIPS().features, LPIPSFeatures)


def test_memorisation_sees_copies() -> None:
    shots = images(4, seed=1)
    metric = with_shots(shots, threshold=1e-6)
    metric.update(torch.cat([shots[:2], images(6, seed=2)]))
    result = metric.result()
    assert result.memorised == 0.25
    assert result.nearest_min == 0
    assert result.nearest_mean > 0


def test_collapsed_cluster_keeps_its_precision() -> None:
    base = torch.randn(1000, dtype=torch.float64)
    rows = (base + 1e-4 * torch.randn(6, 1000, dtype=torch.float64)).float()
    exact = [float((a.double() - b.double()).square().sum()) for a, b in combinations(rows, 2)]
    assert mean_pairwise_distance([rows[:4], rows[4:]]) == pytest.approx(sum(exact) / len(exact), rel=1e-5)
    assert mean_pairwise_distance([rows[:1].repeat(3, 1)]) == 0
    assert math.isnan(mean_pairwise_distance([rows[:1]]))
    assert math.isnan(mean_pairwise_distance([rows[:2], rows[:1] * math.nan]))


def test_first_per_cluster() -> None:
    cluster, index = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([9, 4, 2, 5, 3])
    assert first_per_cluster(cluster, index, 2).tolist() == [4, 1, 2, 3]


def test_errors() -> None:
    refused("protocol must be 'cdc' or 'crdi', got 'cdd'", IntraClusterLPIPS, TinyFeatures(), protocol="cdd")
    refused("cap must be a whole number of at least 2, got 1", IntraClusterLPIPS, TinyFeatures(), cap=1)
    metric = IntraClusterLPIPS(TinyFeatures())
    refused("set_shots", metric.update, images(2), error=RuntimeError)
    refused("shots must be", metric.set_shots, images(2)[0])
    metric.set_shots(images(2))
    refused(r"\(3, 4, 4\) but shots are \(3, 8, 8\)", metric.update, images(2, size=4))
    refused("no samples", metric.compute)


@pytest.mark.parametrize("most", [1, 50, 2**18])
def test_distances_by_some_columns_at_a_time(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is 0 away, and one that is nearly a copy keeps its digits."""
    monkeypatch.setattr(intra_lpips, "DIFFERENCES", most)
    x = torch.rand(5, 37, generator=torch.Generator().manual_seed(0))
    y = torch.cat([x[:2], x[2:3] + 1e-5, torch.rand(1, 37, generator=torch.Generator().manual_seed(1))])
    found = intra_lpips.squared_distances(x, y, torch.float64)
    plain = torch.stack([torch.stack([(a - b).double().square().sum() for b in y]) for a in x])
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
    assert found[0, 0] == found[1, 1] == 0

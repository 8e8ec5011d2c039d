"""Intra-LPIPS: how much the samples that look most like the same shot differ (Ojha et al. 2021, "CDC").

Every sample joins the cluster of its nearest shot; the first ``cap`` members of a cluster, by global sample number, are
compared with each other; the mean over pairs is averaged over clusters. High: the shots were not merely copied.
With ``LPIPS(x, y) = |phi(x) - phi(y)|^2`` the mean over all pairs of m members needs no pairs:
``2/(m - 1) (S2 - |S1|^2 / m)``, ``S1 = sum(phi_i - a)``, ``S2 = sum |phi_i - a|^2`` for any anchor a. The anchor is the
first member: around the shot, the members of a collapsed cluster would cancel.

Distributed and memory: which samples are members is known only when the distances of all ranks are. So ``update`` runs
the backbone once per image for the distances to the shots, and each rank keeps what its possible members need, on the
CPU (at most k * cap of them): their features if these are smaller than the images, or small enough for memory, else the
images. ``compute`` gathers the distances, then only the members, and computes their features again if images were kept.
Backbone passes: n + k * cap at most, against 2 (n k + pairs) of the pairwise code; any number of ranks gives the same
value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from unidad_pl.checks import check_at_least, check_whole
from unidad_pl.metrics.features import LPIPSFeatures, check_network, extract, float_images
from unidad_pl.metrics.gather import RowMetric, distinct_in_order, double

Protocol = Literal["cdc", "crdi"]
CAPS: dict[Protocol, int] = {"cdc": 50, "crdi": 100}
DIFFERENCES = 2**18  # at a time
SUMMED = 256  # columns whose squares are summed in float32
KEPT_BYTES = 2**29  # of features, that possible members may take on a rank; beyond that their images are kept
KEPT = ("kept_index", "kept_cluster", "kept")


@dataclass
class IntraClusterResult:
    """What :meth:`IntraClusterLPIPS.result` finds. Distances are those of the protocol (LPIPS, no unit).

        >>> metric = IntraClusterLPIPS(nn.Flatten(), threshold=0.01)  # pixels as features
        >>> metric.set_shots(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]))
        >>> metric.update(torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.9)]))
        >>> found = metric.result()
        >>> found.cluster_sizes, round(found.memorised, 2)  # the first sample is a shot
        ([2, 1], 0.33)

    Attributes:
        mean: the protocol's number: mean over clusters with two members or more (``cdc``, NaN if there are none), or
            over all clusters (``crdi``).
        mean_with_empty_as_zero: mean over all clusters, those with fewer than two members counted as 0.
        cluster_means: mean pairwise distance of each cluster; NaN with fewer than two members.
        cluster_sizes: samples assigned to each cluster.
        cluster_counts: of these, how many were compared: at most the cap.
        empty_clusters: clusters without a sample.
        single_clusters: clusters with one sample.
        nearest_mean: mean over samples of the distance to the nearest shot.
        nearest_min: the smallest such distance.
        memorised: share of samples nearer than ``threshold`` to a shot.
    """

    mean: float
    mean_with_empty_as_zero: float
    cluster_means: list[float]
    cluster_sizes: list[int]
    cluster_counts: list[int]
    empty_clusters: int
    single_clusters: int
    nearest_mean: float
    nearest_min: float
    memorised: float


def squared_distances(x: Tensor, y: Tensor, kind: torch.dtype) -> Tensor:
    """``|x_i - y_j|^2`` of rows [n, D] and [m, D] -> [n, m], from the differences themselves, summed in ``kind``.

    Some columns at a time: differences of features as wide as LPIPS's stay in a processor's cache. No products, which
    would lose the digits of a copy's distance. Only :data:`SUMMED` columns at a time are summed in float32, which is
    three times as fast as ``kind``: always the same ones, so that a value does not depend on how many rows there are.
    """
    total = torch.zeros(len(x), len(y), dtype=kind, device=x.device)
    width = SUMMED * max(DIFFERENCES // max(len(x) * len(y) * SUMMED, 1), 1)
    for a, b in zip(x.split(width, 1), y.split(width, 1), strict=True):
        squares = (a[:, None] - b).square_()
        if missing := -squares.shape[2] % SUMMED:
            squares = functional.pad(squares, (0, missing))
        total += squares.unflatten(2, (-1, SUMMED)).sum(3).sum(2, dtype=kind)
    return total


def mean_pairwise_distance(features: Iterable[Tensor]) -> float:
    """Mean of ``|phi_i - phi_j|^2`` over all unordered pairs of the rows of ``features``, in one pass.

    Args:
        features: matrices [n_i, D] one after the other. Differences are formed in their own precision, summed in
            float64; memory is two vectors of D.

    Returns:
        NaN for fewer than two rows.
    """
    anchor, first, second, count = None, torch.zeros(()), torch.zeros(()), 0
    for part in features:
        for row in part:
            if anchor is None:
                anchor = row
                first = torch.zeros_like(double(row))
                second = first.new_zeros(())
            difference = double(row - anchor)
            first += difference
            second += difference.square().sum()
            count += 1
    if count < 2:
        return float("nan")
    # Not max(0.0, ...), which makes 0 of NaN.
    return float((2 / (count - 1) * (second - first.square().sum() / count)).clamp_min(0))


def first_per_cluster(cluster: Tensor, index: Tensor, cap: int) -> Tensor:
    """Positions of the ``cap`` lowest indices of every cluster, ordered by (cluster, index).

    Args:
        cluster: [n] int64 cluster of each sample.
        index: [n] int64 global number of each sample.
        cap: how many of a cluster, at most.
    """
    by_index = torch.argsort(index, stable=True)
    order = by_index[torch.argsort(cluster[by_index], stable=True)]
    ordered = cluster[order]
    place = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    return order[place < cap]


class IntraClusterLPIPS(RowMetric):
    """``set_shots(images)``, then ``update(images, indices)``, then ``compute()``: a float64 scalar.

        >>> metric = IntraClusterLPIPS(LPIPSFeatures("squeeze", pnet_rand=True))  # without pnet_rand: the real weights
        >>> metric.set_shots(torch.rand(2, 3, 32, 32))
        >>> metric.update(torch.rand(6, 3, 32, 32))
        >>> bool(metric.compute() > 0), metric.result().mean == metric.compute()
        (True, tensor(True))

    Args:
        features: extractor phi; default ``LPIPSFeatures("vgg")``. Any feature module gives the same statistic of its
            own squared Euclidean distance.
        protocol: ``cdc`` as defined by its authors: everything in [-1, 1], clusters with fewer than two members left
            out. ``crdi`` as in the released code of CRDI and Uni-DAD: samples enter in [0, 1] while shots are in
            [-1, 1], small clusters count as 0. Never mix the two in one table. The distances to the shots, and
            ``memorised``, suffer from that mismatch too.
        cap: how many members of a cluster are compared, at most; default 50 (``cdc``) or 100 (``crdi``).
        threshold: distance to a shot below which a sample counts as memorised.
        batch_size: images per backbone pass.
        kwargs: for ``torchmetrics.Metric``.

    Raises:
        ValueError: an unknown protocol, or a number out of range.
        TypeError: ``features`` is no module.
    """

    higher_is_better = True
    shot_features: Tensor

    def __init__(
        self,
        features: nn.Module | None = None,
        protocol: Protocol = "cdc",
        cap: int | None = None,
        threshold: float = 0.1,
        batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if protocol not in CAPS:
            raise ValueError(f"protocol must be {' or '.join(map(repr, CAPS))}, got {protocol!r}")
        self.cap = CAPS[protocol] if cap is None else cap
        check_whole(2, cap=self.cap)
        check_whole(1, batch_size=batch_size)
        check_at_least(0, threshold=math.nan if threshold is None else threshold)
        self.features = LPIPSFeatures("vgg") if features is None else features
        check_network(features=self.features)
        self.protocol, self.threshold, self.batch_size = protocol, threshold, batch_size
        self.add_rows("index", 1, torch.long, numbers="index")
        self.add_rows("distances", 2, torch.float64, on_cpu=True)
        # What this rank keeps of possible members, one row an entry: numbers, clusters, features or images.
        self.add_rows("kept_index", 1, torch.long, numbers="index", on_cpu=True)
        self.add_rows("kept_cluster", 1, torch.long, on_cpu=True)
        self.add_rows("kept", 2, torch.float32, on_cpu=True)
        # A MetricCollection lets metrics share states that are equal at first; with another cap they will not stay so.
        self.add_state("most", torch.tensor(self.cap), dist_reduce_fx="max")
        self.register_buffer("shot_features", torch.zeros(0, 0), persistent=False)
        self._image_shape: tuple[int, ...] | None = None

    def set_shots(self, images: Tensor) -> None:
        """The training images, [k, 3, H, W] float in [-1, 1], of the same size as the samples will be.

        Raises:
            ValueError: no such images, or none.
        """
        images = float_images(images, "shots")
        if not len(images):
            raise ValueError("shots must be [k, 3, H, W] with k >= 1, got none")
        self.reset()
        self._image_shape = tuple(images.shape[1:])
        self.shot_features = extract(self.features, images.to(self.device), self.batch_size)

    @property
    def _keeps_features(self) -> bool:
        shots, width = self.shot_features.shape
        small = 4 * width * shots * self.cap <= KEPT_BYTES
        return small or width <= torch.Size(self._image_shape or ()).numel()

    def update(self, images: Tensor, indices: Tensor | Sequence[int] | None = None) -> None:
        """Add samples.

        Args:
            images: [N, 3, H, W] float in [-1, 1].
            indices: their global numbers, which decide who is among the first of a cluster; a number seen before is
                the same sample and counts once. Default: in the order they come, dealt to ranks in turn. Give them
                always or never.

        Raises:
            RuntimeError: no shots yet.
            ValueError: images of another size than the shots, with NaN or outside [-1, 1], or indices that do not fit.
        """
        if self._image_shape is None:
            raise RuntimeError("IntraClusterLPIPS has no shots: call set_shots(images) before update")
        images = float_images(images, "samples")
        if tuple(images.shape[1:]) != self._image_shape:
            raise ValueError(
                f"samples are {tuple(images.shape[1:])} but shots are {self._image_shape}: resize the shots"
            )
        numbers = self.number("index", len(images), indices).to(self.device)
        if not len(images):
            return
        if self.protocol == "crdi":
            images = (images + 1) / 2
        for part, number in zip(images.split(self.batch_size), numbers.split(self.batch_size), strict=True):
            phi = extract(self.features, part.to(self.device), self.batch_size)
            distances = squared_distances(phi, self.shot_features, self.scalar(0).dtype)
            self.append("index", number)
            self.append("distances", distances)
            self._keep(phi if self._keeps_features else part, number, distances.argmin(1))

    def _keep(self, rows: Tensor, index: Tensor, cluster: Tensor) -> None:
        """Keep what new samples need as members; drop samples that have ``cap`` of this rank's before them."""
        new = (index.cpu(), cluster.cpu(), rows.detach().float().flatten(1).cpu())
        for name, values in zip(KEPT, new, strict=True):
            getattr(self, name).extend(value.clone() for value in values.split(1))  # a view would keep the whole batch
        numbers = self.rows("kept_index")
        distinct = distinct_in_order(numbers)
        first = first_per_cluster(self.rows("kept_cluster")[distinct], numbers[distinct], self.cap)
        positions = distinct[first].tolist()
        if positions != list(range(len(numbers))):  # else all are kept, as they are
            self._keep_only(positions)

    def _keep_only(self, positions: Sequence[int]) -> None:
        for name in KEPT:
            single = [row for part in getattr(self, name) for row in part.split(1)]
            setattr(self, name, [single[position] for position in positions])

    def _before_gathering(self, name: str) -> None:
        if name == "kept_index" and self.count("index"):
            index, _, members = self._members()
            wanted = set(index[members].tolist())
            own = self.rows("kept_index").tolist()
            self._keep_only([position for position, number in enumerate(own) if number in wanted])

    def _members(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers [n] of the samples, their clusters [n], and which of them are compared: positions."""
        index, distances = self.rows("index").cpu(), self.rows("distances").cpu()
        distinct = distinct_in_order(index)
        index, assigned = index[distinct], distances[distinct].argmin(1)
        return index, assigned, first_per_cluster(assigned, index, self.cap)

    def _features_of(self, rows: Sequence[Tensor]) -> Iterable[Tensor]:
        for start in range(0, len(rows), self.batch_size):
            part = torch.stack(list(rows[start : start + self.batch_size])).to(self.device)
            if not self._keeps_features:
                part = extract(self.features, part.unflatten(1, self._image_shape or ()), self.batch_size)
            yield part

    def result(self) -> IntraClusterResult:
        """The statistics of all samples of all ranks, one by one.

        Raises:
            ValueError: no samples.
        """
        with self.everyones():
            if not self.count("index"):
                raise ValueError("IntraClusterLPIPS has no samples: call update before compute")
            index, assigned, members = self._members()
            distances = self.rows("distances").cpu()[distinct_in_order(self.rows("index").cpu())]
            kept = dict(zip(self.rows("kept_index").tolist(), self.rows("kept"), strict=True))
        clusters = distances.shape[1]
        means, counts = [], []
        for cluster in range(clusters):
            numbers = index[members[assigned[members] == cluster]].tolist()
            means.append(mean_pairwise_distance(self._features_of([kept[number] for number in numbers])))
            counts.append(len(numbers))
        pairs = [mean for mean, count in zip(means, counts, strict=True) if count >= 2]
        with_zeros = sum(pairs) / clusters
        without = sum(pairs) / len(pairs) if pairs else float("nan")
        nearest = distances.amin(1)
        return IntraClusterResult(
            mean=without if self.protocol == "cdc" else with_zeros,
            mean_with_empty_as_zero=with_zeros,
            cluster_means=means,
            cluster_sizes=torch.bincount(assigned, minlength=clusters).tolist(),
            cluster_counts=counts,
            empty_clusters=counts.count(0),
            single_clusters=counts.count(1),
            nearest_mean=float(nearest.mean()),
            nearest_min=float(nearest.min()),
            memorised=float((nearest < self.threshold).double().mean()),
        )

    def compute(self) -> Tensor:
        """The protocol's number, of all samples of all ranks; NaN if no cluster has two samples (``cdc``).

        Raises:
            ValueError: no samples.
        """
        return self.scalar(self.result().mean)

"""Intra-LPIPS: how much the samples that look most like the same shot differ (Ojha et al. 2021, "CDC").

Every sample joins the cluster of its nearest shot; the first ``cap`` members of a cluster, by global sample number, are
compared with each other; the mean over pairs is averaged over clusters. High: the shots were not merely copied.
With ``LPIPS(x, y) = |phi(x) - phi(y)|^2`` the mean over all pairs of m members needs no pairs:
``2/(m - 1) (S2 - |S1|^2 / m)``, ``S1 = sum(phi_i - a)``, ``S2 = sum |phi_i - a|^2`` for any anchor a. The anchor is the
first member: around the shot, the members of a collapsed cluster would cancel.

Distributed and memory: which samples are members is known only when the distances of all ranks are. So ``update`` runs
the backbone once per image for the distances to the shots, and each rank keeps what its possible members need: their
features if these are smaller than the images, else the images, on the CPU (at most k * cap of them). ``compute``
gathers the distances, then only the members, and computes their features again if images were kept. Backbone passes:
n + k * cap at most, against 2 (n k + pairs) of the pairwise code; any number of ranks gives the same value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from unidad_pl.metrics.features import LPIPSFeatures, extract
from unidad_pl.metrics.gather import RowMetric, cat_rows, distinct_in_order, double, sample_indices

Protocol = Literal["cdc", "crdi"]
CAPS: dict[Protocol, int] = {"cdc": 50, "crdi": 100}


@dataclass
class IntraClusterResult:
    """What :class:`IntraClusterLPIPS` computes. Distances are those of the protocol (LPIPS, no unit).

        >>> metric = IntraClusterLPIPS(nn.Flatten(), threshold=0.01)  # pixels as features
        >>> metric.set_shots(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]))
        >>> metric.update(torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.9)]))
        >>> found = metric.compute()
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
    return max(0.0, float(2 / (count - 1) * (second - first.square().sum() / count)))


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
    """``set_shots(images)``, then ``update(images, indices)``, then ``compute() -> IntraClusterResult``.

        >>> metric = IntraClusterLPIPS(LPIPSFeatures("squeeze", pnet_rand=True))  # without pnet_rand: the real weights
        >>> metric.set_shots(torch.rand(2, 3, 32, 32))
        >>> metric.update(torch.rand(6, 3, 32, 32))
        >>> metric.compute().mean > 0
        True

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
    """

    is_differentiable = False
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
        if self.cap < 2 or batch_size < 1 or threshold < 0:
            raise ValueError(
                f"cap must be >= 2, batch_size >= 1, threshold >= 0, got {self.cap}, {batch_size}, {threshold}"
            )
        self.features = LPIPSFeatures("vgg") if features is None else features
        self.protocol, self.threshold, self.batch_size = protocol, threshold, batch_size
        self.add_rows("index", 1, torch.long)
        self.add_rows("distances", 2, torch.float32)
        self.register_buffer("shot_features", torch.zeros(0, 0), persistent=False)
        self._image_shape: tuple[int, ...] | None = None
        self._kept: dict[int, tuple[Tensor, int]] = {}  # number of a possible member -> its row and cluster

    def set_shots(self, images: Tensor) -> None:
        """The training images, [k, 3, H, W] float in [-1, 1], of the same size as the samples will be."""
        if images.ndim != 4 or len(images) < 1:
            raise ValueError(f"shots must be [k, 3, H, W] with k >= 1, got shape {tuple(images.shape)}")
        self.reset()
        self._image_shape = tuple(images.shape[1:])
        self.shot_features = extract(self.features, images.to(self.device), self.batch_size)

    @property
    def _keeps_features(self) -> bool:
        return self.shot_features.shape[1] <= torch.Size(self._image_shape or ()).numel()

    def update(self, images: Tensor, indices: Tensor | Sequence[int] | None = None) -> None:
        """Add samples.

        Args:
            images: [N, 3, H, W] float in [-1, 1].
            indices: their global numbers, which decide who is among the first of a cluster; a number seen before is
                the same sample and counts once. Default: in the order they come, dealt to ranks in turn.

        Raises:
            RuntimeError: no shots yet.
            ValueError: images of another size than the shots.
        """
        if self._image_shape is None:
            raise RuntimeError("IntraClusterLPIPS has no shots: call set_shots(images) before update")
        if tuple(images.shape[1:]) != self._image_shape:
            raise ValueError(
                f"samples are {tuple(images.shape[1:])} but shots are {self._image_shape}: resize the shots"
            )
        numbers = sample_indices(len(images), indices, start=self.count("index")).to(self.device)
        if not len(images):
            return
        if self.protocol == "crdi":
            images = (images + 1) / 2
        for part, number in zip(images.split(self.batch_size), numbers.split(self.batch_size), strict=True):
            phi = extract(self.features, part.to(self.device), self.batch_size)
            distances = torch.stack([(phi - shot).square().sum(1) for shot in self.shot_features], 1)
            self.append("index", number)
            self.append("distances", distances)
            self._keep(phi if self._keeps_features else part, number, distances.argmin(1))

    def _keep(self, rows: Tensor, index: Tensor, cluster: Tensor) -> None:
        """Keep what new samples need as members; drop samples that have ``cap`` of this rank's before them."""
        for number, row, own in zip(index.tolist(), rows.detach().float().cpu(), cluster.tolist(), strict=True):
            self._kept.setdefault(number, (row.clone(), own))  # a view would keep the whole batch
        numbers = torch.tensor(list(self._kept))
        clusters = torch.tensor([own for _, own in self._kept.values()])
        chosen = numbers[first_per_cluster(clusters, numbers, self.cap)]
        self._kept = {number: self._kept[number] for number in chosen.tolist()}

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Only ``update``: the value of a single batch has no meaning."""
        self.update(*args, **kwargs)

    def reset(self) -> None:
        """Forget the samples; the shots stay."""
        super().reset()
        self._kept = {}

    def _members(self, wanted: Tensor) -> dict[int, Tensor]:
        """What was kept of the samples numbered ``wanted``, from all ranks: number -> row."""
        own = sorted(set(wanted.tolist()) & set(self._kept))
        shape = self.shot_features.shape[1:] if self._keeps_features else torch.Size(self._image_shape or ())
        rows = torch.stack([self._kept[number][0] for number in own]) if own else torch.zeros(0, *shape)
        index = torch.tensor(own, dtype=torch.long)
        if self._is_synced:
            rows = cat_rows(gather_all_tensors(rows.to(self.device), self.process_group)).cpu()
            index = cat_rows(gather_all_tensors(index.to(self.device), self.process_group)).cpu()
        return dict(zip(index.tolist(), rows, strict=True))

    def _features_of(self, rows: Sequence[Tensor]) -> Iterable[Tensor]:
        for start in range(0, len(rows), self.batch_size):
            part = torch.stack(list(rows[start : start + self.batch_size])).to(self.device)
            yield part if self._keeps_features else extract(self.features, part, self.batch_size)

    def compute(self) -> IntraClusterResult:
        """The statistics of all samples of all ranks.

        Raises:
            ValueError: no samples.
        """
        index, distances = self.rows("index").cpu(), self.rows("distances").cpu()
        if not len(index):
            raise ValueError("IntraClusterLPIPS has no samples: call update before compute")
        distinct = distinct_in_order(index)
        index, distances = index[distinct], distances[distinct]
        clusters = distances.shape[1]
        assigned = distances.argmin(1)
        members = first_per_cluster(assigned, index, self.cap)
        kept = self._members(index[members])
        means, counts = [], []
        for cluster in range(clusters):
            numbers = index[members[assigned[members] == cluster]].tolist()
            means.append(mean_pairwise_distance(self._features_of([kept[number] for number in numbers])))
            counts.append(len(numbers))
        sizes = torch.bincount(assigned, minlength=clusters).tolist()
        pairs = [mean for mean, count in zip(means, counts, strict=True) if count >= 2]
        with_zeros = sum(pairs) / clusters
        without = sum(pairs) / len(pairs) if pairs else float("nan")
        nearest = distances.amin(1)
        return IntraClusterResult(
            mean=without if self.protocol == "cdc" else with_zeros,
            mean_with_empty_as_zero=with_zeros,
            cluster_means=means,
            cluster_sizes=sizes,
            cluster_counts=counts,
            empty_clusters=counts.count(0),
            single_clusters=counts.count(1),
            nearest_mean=float(nearest.double().mean()),
            nearest_min=float(nearest.min()),
            memorised=float((nearest < self.threshold).double().mean()),
        )

"""Of each shot's cluster the samples nearest to the shot, and those most different from it, as pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unidad_pl.metrics.gather import RowMetric, distinct_in_order

FOLDER = "samples/clusters"
NEAREST, DIFFERENT = "nearest", "most_different"


class ClusterPictures(RowMetric):
    """The ``wanted`` samples nearest to each shot, of those it is the nearest shot of, and the ``wanted`` farthest.

        >>> pictures, images = ClusterPictures(1), torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
        >>> pictures.update(images, torch.arange(3), distances=torch.tensor([[1.0], [3.0], [2.0]]))
        >>> pictures.of_clusters(1)[1]
        [{'nearest': [[0, 1.0]], 'most_different': [[1, 3.0]]}]

    A rank keeps no more than it may need.

    Args:
        wanted: of each kind in each cluster.
    """

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted = wanted
        self.add_rows("index", 1, torch.long, numbers="index", on_cpu=True)
        self.add_rows("cluster", 1, torch.long, on_cpu=True)
        self.add_rows("distance", 1, torch.float64, on_cpu=True)
        self.add_rows("images", 4, torch.uint8, on_cpu=True)

    def update(self, images: Tensor, index: Tensor, distances: Tensor) -> None:
        """``images`` [B, 3, H, W] uint8 numbered ``index`` [B], at ``distances`` [B, shots] from the shots."""
        if not len(images):
            return
        nearest = distances.min(1)
        for name, rows in (("images", images), ("index", index), ("cluster", nearest.indices),
                           ("distance", nearest.values)):  # fmt: skip
            self.append(name, rows)
        kept = torch.cat([part for pair in self._chosen().values() for part in pair])
        for name in ("images", "index", "cluster", "distance"):
            setattr(self, name, [self.rows(name)[kept]])

    def _chosen(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Cluster -> positions of its nearest and of its farthest samples; none is in both."""
        distinct = distinct_in_order(self.rows("index"))
        order = distinct[torch.argsort(self.rows("distance")[distinct], stable=True)]
        cluster = self.rows("cluster")[order]
        members = {int(number): order[cluster == number] for number in cluster.unique()}
        return {number: (own[: self.wanted], own[self.wanted :].flip(0)[: self.wanted])
                for number, own in members.items()}  # fmt: skip

    def compute(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Cluster -> positions of its nearest, and of its farthest samples, in the rows of all ranks."""
        return self._chosen()

    def of_clusters(self, clusters: int) -> tuple[Tensor, list[dict[str, Any]]]:
        """Images [clusters, 2 wanted, 3, H, W] uint8, white where there are none: the nearest first, then the most
        different one first; and for each cluster [seed, distance] of both kinds. All ranks must ask together."""
        with self.everyones():
            chosen, images = self._chosen(), self.rows("images")
            pictures = images.new_full((clusters, 2 * self.wanted, *images.shape[1:]), 255)
            listed: list[dict[str, Any]] = []
            for number in range(clusters):
                kinds: dict[str, Any] = {NEAREST: [], DIFFERENT: []}
                for place, (kind, own) in enumerate(zip(kinds, chosen.get(number, ()), strict=False)):
                    pictures[number, place * self.wanted : place * self.wanted + len(own)] = images[own]
                    pairs = zip(self.rows("index")[own].tolist(), self.rows("distance")[own].tolist(), strict=True)
                    kinds[kind] = [list(pair) for pair in pairs]
                listed.append(kinds)
        return pictures, listed

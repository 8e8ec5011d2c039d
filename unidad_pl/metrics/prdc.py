"""Precision, recall, density and coverage of generated features among reference features (Naeem et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from unidad_pl.checks import check_whole
from unidad_pl.metrics.gather import double
from unidad_pl.metrics.two_sample import TwoSample, check_pair

NAMES = ("precision", "recall", "density", "coverage")
ROWS = 512  # of a distance matrix at a time: 0.2 GB in float64 for 50 000 images
SPARE = 2
"""Neighbours more than asked for that are found roughly and then measured."""
CACHED = 16
"""Rows whose differences to their neighbours fit into a processor's cache."""
FEW = 8
"""Distances that are measured one by one, on average of a row; all of them at once if there are more."""
TIE = 1e-9
"""Where samples are copies of references many distances are equal to a radius: these are not inside, however they are
rounded."""


class _Points:
    """Rows [n, D] in float64, and in a type whose products may be faster: rough distances, and how wrong they may be.

    Args:
        rows: near 0, or rounding shows; none longer than about 1.
        kind: the faster type.
    """

    def __init__(self, rows: Tensor, kind: torch.dtype) -> None:
        self.rows, self.norms = rows, torch.linalg.vector_norm(rows, dim=1).square()
        self.fast, self.fast_norms = rows.to(kind), self.norms.to(kind)
        # Of D products and their sums, each rounded; the rest is for the rounding of the rows and norms themselves.
        self.slack = (rows.shape[1] + 16) * torch.finfo(kind).eps

    def rough(self, here: slice, other: _Points, there: slice) -> Tensor:
        """Squared distances [n, m] of own rows to rows of ``other``, right to within :meth:`doubt`."""
        return _squared(self.fast[here], other.fast[there], self.fast_norms[here], other.fast_norms[there])

    def doubt(self, norms: Tensor, other_norms: Tensor) -> Tensor:
        return (norms + other_norms).mul_(self.slack).add_(1e-30)  # the last for what is too small for the faster type

    def measured(self, here: slice, other: _Points) -> Tensor:
        """Squared distances in float64 to all rows of ``other``."""
        return _squared(self.rows[here], other.rows, self.norms[here], other.norms)


def _squared(x: Tensor, y: Tensor, norms_x: Tensor, norms_y: Tensor) -> Tensor:
    return torch.addmm(norms_y, x, y.T, alpha=-2).add_(norms_x[:, None]).clamp_min_(0)


def _radii(x: _Points, neighbours: int) -> Tensor:
    """Squared distance of every row to its ``neighbours``-th nearest other row, and no tie: [n].

    Distances are symmetric: those of a row to the rows before it are taken from theirs.
    """
    count = len(x.rows)
    most = min(neighbours + 1 + SPARE, count)  # a row is the nearest one to itself
    nearest = x.fast.new_full((count, most), math.inf)
    numbers = torch.zeros(count, most, dtype=torch.long, device=nearest.device)

    def add(rows: slice, first: int, distances: Tensor) -> None:
        found = distances.topk(min(most, distances.shape[1]), dim=1, largest=False)
        values = torch.cat([nearest[rows], found.values], 1)
        nearest[rows], place = values.topk(most, dim=1, largest=False)
        numbers[rows] = torch.cat([numbers[rows], found.indices + first], 1).gather(1, place)

    for start in range(0, count, ROWS):
        here, after = slice(start, start + ROWS), slice(start + ROWS, None)
        distances = x.rough(here, x, slice(start, None))
        add(here, start, distances)
        if start + ROWS < count:
            add(after, start, distances[:, ROWS:].T)
    among = [
        x.rows[near].sub_(row).square_().sum(2)
        for row, near in zip(x.rows[:, None].split(CACHED), numbers.split(CACHED), strict=True)
    ]
    radii = torch.cat(among).sort(1).values[:, neighbours]
    # No other row may be nearer than the farthest of those that were measured.
    least = nearest[:, -1] - x.doubt(x.fast_norms, x.fast_norms.max())
    unsure = (least <= radii).nonzero().flatten() if most < count else numbers[:0, 0]
    for part in unsure.split(ROWS):
        near = x.measured(part, x).topk(neighbours + 1, dim=1, largest=False).indices
        for some, row in zip(near.split(CACHED), part.split(CACHED), strict=True):  # of copies exactly 0
            radii[row] = (x.rows[some] - x.rows[row, None]).square_().sum(2).amax(1)
    return radii * (1 - TIE)


def _distances(x: _Points, y: _Points, radii_x: Tensor, radii_y: Tensor) -> Iterator[Tensor]:
    """Squared distances [n, m], some rows at a time, each on the right side of both radii."""
    for start in range(0, len(x.rows), ROWS):
        here = slice(start, start + ROWS)
        found = x.rough(here, y, slice(None))
        doubt = x.doubt(x.fast_norms[here, None], y.fast_norms)
        limits = radii_y.to(found), radii_x[here, None].to(found)
        near = ((found - limits[0]).abs_() <= doubt).logical_or_((found - limits[1]).abs_() <= doubt)
        i, j = near.nonzero(as_tuple=True)
        if len(i) > FEW * len(found):
            found = x.measured(here, y)
        else:
            found = found.double()
            found[i, j] = (x.rows[here][i] - y.rows[j]).square().sum(1)
        yield found


def _fast_type(device: torch.device) -> torch.dtype:
    """float32 where its products are what they should be: not bfloat16's or TF32's, which torch can be told to take."""
    try:
        whole = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch was told in two ways
        whole = False
    return torch.float32 if whole and device.type == "cpu" else torch.float64


def prdc(x: Tensor, y: Tensor, neighbours: int = 5) -> dict[str, float]:
    """How well generated features ``x`` [n, D] cover reference features ``y`` [m, D], in float64.

    A ball around each image reaches to its ``neighbours``-th nearest image of the same set.
    precision: share of generated images inside a reference ball; recall: share of reference images inside a generated
    ball; density: mean number of reference balls a generated image is in, over ``neighbours``; coverage: share of
    reference balls that hold a generated image.

    Raises:
        ValueError: shapes that do not match, or no more than ``neighbours`` images in one of the sets.
    """
    check_whole(1, neighbours=neighbours)
    check_pair(x, y, f"PRDC with {neighbours} neighbours", least=neighbours + 1)
    x, y = double(x), double(y)
    centre = y.mean(0)
    x, y = x - centre, y - centre
    scale = max(float(torch.linalg.vector_norm(part, dim=1).max()) for part in (x, y)) or 1.0
    own, others = (_Points(part.div_(scale), _fast_type(part.device)) for part in (x, y))
    radii_x, radii_y = _radii(own, neighbours), _radii(others, neighbours)
    balls = []
    covered, recalled = (torch.zeros(len(y), dtype=torch.bool, device=y.device) for _ in range(2))
    for distances, radii in zip(_distances(own, others, radii_x, radii_y), radii_x.split(ROWS), strict=True):
        inside = distances < radii_y
        balls.append(inside.sum(1))
        covered |= inside.any(0)
        recalled |= (distances < radii[:, None]).any(0)
    of_sample = torch.cat(balls).double()
    return {
        "precision": float((of_sample > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(of_sample.mean() / neighbours),
        "coverage": float(covered.double().mean()),
    }


class PRDC(TwoSample):
    """:func:`prdc` as a metric: ``update(features, real)``, then ``compute()``: a dict of float64 scalars.

        >>> metric, reference = PRDC(neighbours=3), torch.randn(50, 4)
        >>> metric.update(reference, real=True)
        >>> metric.update(reference[:10], real=False)
        >>> found = metric.compute()
        >>> float(found["precision"]), bool(found["coverage"] < 1)  # all of it real, not all of the real
        (1.0, True)

    Args:
        neighbours: see :func:`prdc`.
        kwargs: for :class:`~unidad_pl.metrics.two_sample.TwoSample`.

    Raises:
        ValueError: ``neighbours`` below 1.
    """

    higher_is_better = True

    def __init__(self, neighbours: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_whole(1, neighbours=neighbours)
        self.neighbours, self.least = neighbours, neighbours + 1

    def value(self, generated: Tensor, reference: Tensor) -> dict[str, Tensor]:
        return {name: self.scalar(value) for name, value in prdc(generated, reference, self.neighbours).items()}

    def undefined(self) -> dict[str, Tensor]:
        return dict.fromkeys(NAMES, self.scalar(math.nan))

"""FID statistics in files: the same distance as from the features, and nothing else is taken for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.metrics.test_two_sample import features, fidelity_fid
from tests.metrics.toys import refused
from unidad_pl.files import BrokenFile
from unidad_pl.metrics import Gaussian, frechet_distance, read_statistics


def write(place: Path, features: torch.Tensor, kind: Any = np.float64, **more: Any) -> Path:
    rows = features.double().numpy()
    entries = {"mu": rows.mean(0).astype(kind), "sigma": np.cov(rows, rowvar=False).astype(kind)}
    np.savez(place / "reference.npz", **{name: value for name, value in (entries | more).items() if value is not None})
    return place / "reference.npz"


@pytest.mark.parametrize(("count", "kind", "tolerance"), [
    (200, np.float64, 1e-9), (10, np.float64, 1e-6), (200, np.float32, 1e-4),
])  # fmt: skip
def test_the_distance_is_that_of_the_features(count: int, kind: Any, tolerance: float, tmp_path: Path) -> None:
    """Of a covariance of full rank, and of fewer images than features."""
    x, y = features(60, 32, 1), features(count, 32, 2, shift=0.3)
    found = Gaussian.of(x).distance(read_statistics(write(tmp_path, y, kind)))
    assert found == pytest.approx(frechet_distance(x, y), abs=tolerance)
    assert found == pytest.approx(fidelity_fid(x, y), abs=max(tolerance, 1e-3))


def test_other_entries_are_left_alone(tmp_path: Path) -> None:
    """Released files hold spatial statistics and pictures too."""
    y = features(50, 4)
    file = write(tmp_path, y, mu_s=np.zeros(3), arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    assert frechet_distance(y, y) == pytest.approx(Gaussian.of(y).distance(read_statistics(file)), abs=1e-9)


SKEWED = np.array([[1.0, 0.5], [0.0, 1.0]])
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"sigma": None}, "it has no sigma, only mu"),
    ({"mu": None}, "it has no mu"),
    ({"mu": np.zeros(3)}, r"it holds mu float64 \(3,\) and sigma float64 \(2, 2\)"),
    ({"mu": np.zeros((1, 2))}, "it holds mu float64"),
    ({"sigma": np.zeros(2)}, r"sigma float64 \(2,\)"),
    ({"mu": np.zeros(2, np.int64)}, "mu int64"),
    ({"mu": np.array(["a", "b"])}, "it holds mu <U1"),
    ({"mu": np.array([np.nan, 0])}, "NaN or infinite"),
    ({"sigma": np.full((2, 2), np.inf)}, "NaN or infinite"),
    ({"sigma": SKEWED}, "sigma is not symmetric"),
    ({"sigma": -np.eye(2)}, "no covariance: it has a variance of -1"),
    ({"mu": np.array([{}, {}], dtype=object)}, "allow_pickle"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_is_no_mean_and_covariance_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write(tmp_path, features(20, 2), **change)
    refused(f"'{file}' is no readable file of FID statistics .*{message}", read_statistics, file, error=BrokenFile)


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04", b"\x80\x04K\x01."])
def test_what_is_no_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    file.write_bytes(content)
    refused("is no readable file of FID statistics", read_statistics, file, error=BrokenFile)
    np.save(file.with_suffix(".npy"), np.zeros(3))
    refused("it has no mu and no sigma, only one array", read_statistics, file.with_suffix(".npy"), error=BrokenFile)
    refused("there is no file", read_statistics, tmp_path / "b.npz", error=FileNotFoundError)

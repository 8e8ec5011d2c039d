"""Frechet distance, KID, PRDC and intra-LPIPS against the usual libraries: the same values, CPU seconds, their ratio.

    python -m tests.benchmarks evaluation [--images 5000] [--width 2048] [--out FILE]

Above 1 is faster here. Features are random; intra-LPIPS runs LPIPS-squeeze with random weights on 64 px images, against
the pairwise code of ``lpips`` as CDC's authors run it.
"""

from __future__ import annotations

import argparse
from typing import Any

import lpips
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from tests.benchmarks.measuring import interleaved, keep
from unidad_pl.metrics import IntraClusterLPIPS, LPIPSFeatures, frechet_distance, kid
from unidad_pl.metrics.prdc import prdc

CAP = 50  # of CDC's protocol


def features(count: int, width: int, shift: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(count, width, generator=generator.manual_seed(int(100 * shift) + 1)) @ mix + shift


def two_sample(images: int, width: int) -> dict[str, Any]:
    """KID, PRDC and Frechet; ``difference`` is that of the values."""
    x, y = features(images, width, 0.1), features(images, width, 0.0)
    x64, y64 = x.double(), y.double()
    found: dict[str, Any] = {}

    def theirs_kid() -> Any:
        return kid_features_to_metric(x64, y64, kid_subsets=100, kid_subset_size=1000, rng_seed=2020, verbose=False)

    def theirs_prc() -> Any:
        return prc_features_to_metric(x64, y64, prc_neighborhood=3, prc_batch_size=10_000, verbose=False)

    def theirs_fid() -> Any:
        statistics = [fid_features_to_statistics(part) for part in (x64, y64)]
        return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]

    for name, ours, theirs in (
        ("kid", lambda: kid(x, y), theirs_kid), ("prdc", lambda: prdc(x, y, 3), theirs_prc),
        ("frechet", lambda: frechet_distance(x, y), theirs_fid),
    ):  # fmt: skip
        seconds = interleaved(1, ours=ours, theirs=theirs)
        found[name] = seconds | {"ratio": seconds["theirs"] / seconds["ours"]}
    found["kid"]["difference"] = abs(kid(x, y)[0] - theirs_kid()["kernel_inception_distance_mean"])
    found["prdc"]["difference"] = abs(prdc(x, y, 3)["precision"] - float(theirs_prc()["precision"]))
    found["frechet"]["difference"] = abs(frechet_distance(x, y) - float(theirs_fid()))
    return found


def intra(samples: int, shots: int) -> dict[str, float]:
    """Clusters of ``samples`` images around ``shots``, every pair of the first :data:`CAP` of each compared."""
    images, near = torch.rand(samples, 3, 64, 64) * 2 - 1, torch.rand(shots, 3, 64, 64) * 2 - 1
    torch.manual_seed(0)
    network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    own = LPIPSFeatures("squeeze", pnet_rand=True)
    values = {}

    def theirs() -> None:
        with torch.no_grad():
            nearest = [
                int(torch.stack([network(x[None], s[None]).flatten()[0] for s in near]).argmin()) for x in images
            ]
            means = []
            for cluster in range(shots):
                members = [x for x, c in zip(images, nearest, strict=True) if c == cluster][:CAP]
                pairs = [network(a[None], b[None]).flatten() for i, a in enumerate(members) for b in members[i + 1 :]]
                means += [torch.cat(pairs).mean()] if pairs else []
            values["theirs"] = float(torch.stack(means).mean())

    def ours() -> None:
        metric = IntraClusterLPIPS(own, cap=CAP)
        metric.set_shots(near)
        metric.update(images)
        values["ours"] = float(metric.compute())

    seconds = interleaved(1, ours=ours, theirs=theirs)
    difference = abs(values["ours"] - values["theirs"])
    return seconds | {"ratio": seconds["theirs"] / seconds["ours"], "difference": difference}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=200, help="of intra-LPIPS, with ten shots")
    parser.add_argument("--out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {name: value for name, value in vars(given).items() if name != "out"}
    keep({"sizes": sizes, **two_sample(given.images, given.width), "intra_lpips": intra(given.samples, 10)},
         given.out)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

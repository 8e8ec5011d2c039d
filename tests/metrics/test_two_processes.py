"""Every metric gives on two ranks what it gives on one process with all samples."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.metrics.toys import Pixels, TinyFeatures, close, images
from tests.processes import run_apart
from unidad_pl.metrics import KID, PRDC, Frechet, GaussianMMD, IntraClusterLPIPS, PromptLPIPS, SubjectCosines
from unidad_pl.metrics.two_sample import TwoSample

TOTAL = 31
KINDS = (Frechet, lambda: KID(subsets=5, subset_size=8), lambda: PRDC(neighbours=3))


def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return images(3, seed=1), images(TOTAL, seed=2), images(20, seed=3)


def check_digits(rank: int, share: list[torch.Tensor]) -> None:
    """Where features are not rounded, numbers of one rank and of two agree to the last digits of float64."""
    shots, generated, real = samples()
    prompts = [f"prompt {number % 3}" for number in range(TOTAL)]

    def found(numbers: torch.Tensor, reference: torch.Tensor, size: int, **alone: bool) -> list[object]:
        pair = [kind(**alone) for kind in (Frechet, KID, PRDC, GaussianMMD)]
        intra = IntraClusterLPIPS(Pixels(), cap=4, batch_size=size, **alone)
        subject, varied = SubjectCosines({"a": Pixels()}, batch_size=size, **alone), PromptLPIPS(Pixels(), **alone)
        intra.set_shots(shots), subject.set_photos(shots)
        for part in numbers.split(size):
            told = [prompts[number] for number in part.tolist()]
            intra.update(generated[part], part)
            subject.update(generated[part], told, part), varied.update(generated[part], told, part)
            for metric in pair:
                metric.update(generated[part].flatten(1), real=False, indices=part)
        for metric in pair:
            metric.update(real[reference].flatten(1), real=True, indices=reference)
        details = [vars(intra.result()), vars(subject.result()), vars(varied.result())]
        return [metric.compute() for metric in (*pair, intra, subject, varied)] + details

    single = found(torch.arange(TOTAL), torch.arange(20), 7, sync_on_compute=False)
    both = found(share[rank], torch.arange(20)[rank::2], 4)
    assert close(both, single, 1e-12, 1e-12), (both, single)


def two_sample(metric: TwoSample, numbers: torch.Tensor, reference: torch.Tensor) -> TwoSample:
    features, (_, generated, real) = TinyFeatures(), samples()
    features.requires_grad_(False).eval()
    for part in numbers.split(4):
        metric.update(features(generated[part]), real=False, indices=part)
    for part in reference.split(5):
        metric.update(features(real[part]), real=True, indices=part)
    return metric


def intra(numbers: torch.Tensor, spatial: bool, protocol: str) -> IntraClusterLPIPS:
    shots, generated, _ = samples()
    metric = IntraClusterLPIPS(TinyFeatures(spatial=spatial), protocol=protocol, cap=4, batch_size=3)
    metric.set_shots(shots)
    for part in numbers.split(5):
        metric.update(generated[part], part)
    return metric


def worker(rank: int, rendezvous: str, shares: list[list[torch.Tensor]], expected: list[list[object]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for share, single in zip(shares, expected, strict=True):
        check_digits(rank, share)
        own = share[rank]
        reference = torch.arange(20)[rank::2]
        found = [two_sample(kind(), own, reference).compute() for kind in KINDS]
        metrics = [intra(own, spatial, protocol) for spatial in (False, True) for protocol in ("cdc", "crdi")]
        found += [vars(metric.result()) for metric in metrics]
        for number, (a, b) in enumerate(zip(found, single, strict=True)):
            assert close(a, b), (rank, number, a, b)
        more = samples()[1][:1]  # after compute, each rank goes on with its own samples
        metrics[0].update(more, [TOTAL + rank])
        assert sum(metrics[0].result().cluster_sizes) == sum(single[3]["cluster_sizes"]) + 2
    metric = Frechet()  # default numbers are dealt in turn: no sample is lost
    dealt = TinyFeatures().requires_grad_(False).eval()(samples()[1][rank::2])
    metric.update(dealt, real=False)
    metric.update(dealt, real=True)
    assert metric.compute() < 1e-9
    dist.destroy_process_group()


def main() -> None:
    every = torch.arange(TOTAL)
    halves = [every[0::2], every[1::2]]
    padded = [every[0::2], torch.cat([every[1::2], every[:1]])]  # as DistributedSampler pads
    blocks = [every[20:], every[:20]]
    lonely = [every, every[:0]]  # a rank without a sample
    shares = [halves, padded, blocks, lonely]
    single: list[object] = [two_sample(kind(), every, torch.arange(20)).compute() for kind in KINDS]
    single += [
        vars(intra(every, spatial, protocol).result()) for spatial in (False, True) for protocol in ("cdc", "crdi")
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (os.path.join(folder, "rendezvous"), shares, [single] * len(shares))
        mp.start_processes(worker, arguments, nprocs=2, start_method="fork")  # no second import
    sys.stdout.write("all equal\n")


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    assert "all equal" in run_apart(tmp_path, main)

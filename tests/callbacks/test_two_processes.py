"""Two ranks record what one records, and fail together."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.callbacks.toys import SIZE, Data, Judge, Prompted, Toy, trainer
from tests.metrics.toys import Pixels, TinyFeatures, WordVectors, close
from tests.processes import run_apart
from unidad_pl import callbacks as cb
from unidad_pl.data import Evaluation, FewShotDataModule, Reference


class Uneven(Data):
    """One seed on rank 1, the others on rank 0 (Lightning skips the loop of a rank that has none)."""

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        own = range(self.seeds)[1:] if self.trainer.global_rank == 0 else range(1)
        return DataLoader(own, batch_size=self.batch)


class Dealt(FewShotDataModule):
    """``count`` seeds, shared out as in a run of ours."""

    def __init__(self, count: int) -> None:
        super().__init__("builtin:faces", shots=3, resolution=SIZE, reference=Reference("builtin:faces:40"),
                         evaluation=Evaluation(val_samples=count, batch_size=10))  # fmt: skip


class PromptedBatches(Prompted):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return super().validation_step(batch["seeds"], batch_idx)


class OnlyFirst(TinyFeatures):
    """Can be loaded on rank 0 only."""

    def load(self) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise RuntimeError("no such file on this machine")


def callbacks(features: type[nn.Module] = TinyFeatures, width: int = 8) -> list[pl.Callback]:
    return [
        cb.FID(features()),
        cb.IntraLPIPS(features(), relative=True, cap=3),
        cb.AttributeShare({"glasses": "dark"}, Judge()),
        cb.SampleGrid(count=5, scale=1),
        cb.SubjectSimilarity(image_encoder=features(), text_encoder=WordVectors(width), dino=features(), token="prt"),
        cb.PromptDiversity(features()),
        cb.PromptGrid(scale=1),
    ]


def validate(
    folder: Path, devices: int, data: pl.LightningDataModule, own: list[pl.Callback] | None = None, **options: Any
) -> list[dict[str, Any]]:
    strategy = "ddp_fork" if devices > 1 else "auto"
    run = trainer(folder, *(callbacks() if own is None else own), devices=devices, strategy=strategy, **options)
    run.validate(Prompted() if isinstance(data, Data) else PromptedBatches(), datamodule=data, verbose=False)
    records = cb.read_records(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def failure(folder: Path, *own: pl.Callback) -> str:
    run = trainer(folder, *own, devices=2, strategy="ddp_fork")
    try:
        run.validate(Toy(), datamodule=Data(), verbose=False)
    except Exception as error:  # noqa: BLE001 (the launcher wraps what a rank raised)
        return str(error)
    return "nothing went wrong"


def check_every_count(root: Path) -> None:
    """Each sample counts once for any number of samples on any number of ranks, and float64 is all that is rounded."""
    # Ranks without a sample, uneven shares, several batches on each rank.
    for count, worlds in ((1, (1, 3)), (7, (1, 3)), (64, (1, 2))):
        own = callbacks(Pixels, 3 * SIZE * SIZE)
        options = dict(use_distributed_sampler=False)
        found = [validate(root / f"{count}_{world}", world, Dealt(count), own, **options) for world in worlds]
        assert len(found[0]) == 5
        assert all(record["samples"] == count for record in found[0])
        for other in found[1:]:
            assert close(found[0], other, 1e-12, 1e-12), (count, found)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        check_every_count(Path(name))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        single = validate(root / "one", 1, Data(seeds=23))
        pictures = {path.relative_to(root / "one"): path.read_bytes() for path in (root / "one").rglob("*.png")}
        assert len(pictures) == 4  # a grid, one of each prompt, the clusters
        runs = {
            "dealt and padded": validate(root / "two", 2, Data(seeds=23)),
            "uneven": validate(root / "three", 2, Uneven(seeds=23), use_distributed_sampler=False),
        }
        assert len(single) == 5
        for case, found in runs.items():
            assert close(found, single), (case, found, single)
        for folder in ("two", "three"):
            assert all((root / folder / path).read_bytes() == picture for path, picture in pictures.items())
        writer = trainer(root / "four", cb.PredictionWriter(), devices=2, strategy="ddp_fork")
        writer.predict(Toy(), datamodule=Data(seeds=23), return_predictions=False)
        assert len(list((root / "four" / "predictions").iterdir())) == 23
        message = failure(root / "five", cb.FID(OnlyFirst()))
        assert "FID cannot begin" in message, message
        (root / "six" / "metrics.jsonl").mkdir(parents=True)
        message = failure(root / "six", cb.FID(TinyFeatures()))
        assert "cannot write" in message, message
    assert isinstance(OnlyFirst(), nn.Module)
    sys.stdout.write("all equal\n")


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    assert "all equal" in run_apart(tmp_path, main)

"""Other people's modules: what they do beside the step is done, what they return is read or said to be left out."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader

from tests.callbacks.toys import REFERENCE, SIZE, Data, Toy, trainer
from tests.metrics.toys import TinyFeatures, images, refused
from unidad_pl.callbacks import FID, Cost, Preemption, SampleGrid, SoundCheckpoint, read_records
from unidad_pl.metrics import Frechet


class Averaged(Toy):
    """Plain descent on the same images in every epoch, and an average that is updated after the step."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Identity()
        self.register_buffer("average", torch.zeros(3, SIZE, SIZE))
        self.register_buffer("updates", torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.mean - batch).square().sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.lerp_(self.mean.detach(), 0.5)
        self.updates += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Signalled(pl.Callback):
    """A signal in one batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.current_epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class Counted(pl.Callback):
    """Counts batches, and keeps the count in checkpoints."""

    seen = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


@pytest.mark.parametrize(("accumulate", "batch"), [(1, 1), (2, 0), (3, 0), (3, 3)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(accumulate: int, batch: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 2, "limit_val_batches": 0, "val_check_interval": None,
                               "accumulate_grad_batches": accumulate}  # fmt: skip
    whole, counted = Averaged(), Counted()
    trainer(tmp_path, Preemption(), counted, **options).fit(whole, datamodule=Data())
    run = trainer(tmp_path, Preemption(), Counted(), Signalled(batch), **options)
    with pytest.raises(SystemExit):
        run.fit(Averaged(), datamodule=Data())
    resumed, after = Averaged(), Counted()
    state = torch.load(tmp_path / "checkpoints" / "preempted.ckpt", weights_only=True)
    assert 0 < state["state_dict"]["updates"] < 8
    # Lightning begins the loader anew: batches that were seen are left out by hand.
    left = images(8, SIZE, seed=7)[int(state["state_dict"]["updates"]) * 2 :]

    class Rest(Data):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(left if not after.seen or after.seen < 4 else images(8, SIZE, seed=7), batch_size=2)

    again = trainer(tmp_path, Preemption(), after, reload_dataloaders_every_n_epochs=1, **options)
    again.fit(resumed, datamodule=Rest(), ckpt_path=str(tmp_path / "checkpoints" / "preempted.ckpt"))
    assert float(resumed.updates) == float(whole.updates) == after.seen == counted.seen == 8
    torch.testing.assert_close(resumed.mean, whole.mean, rtol=0, atol=0)
    torch.testing.assert_close(resumed.average, whole.average, rtol=0, atol=0)


class Encoder(TinyFeatures):
    """Features of the network that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * self.scale)


def test_features_that_are_trained_are_those_of_the_moment(tmp_path: Path) -> None:
    class Own(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (self.encoder.scale - 0.2).square().sum()

    module = Own()
    trainer(tmp_path, FID(module.encoder, cache=False)).fit(module, datamodule=Data())
    trainer(tmp_path, FID(module.encoder, cache=False)).validate(module, datamodule=Data(), verbose=False)
    *_, last, anew = [record["values"]["fid"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert last == pytest.approx(anew, rel=1e-6)


def test_what_counts_stops_counting_when_an_epoch_is_skipped(tmp_path: Path) -> None:
    class Skips(Toy):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    module, cost = Skips(), Cost()
    trainer(tmp_path, cost, max_steps=-1, max_epochs=2, limit_val_batches=0, val_check_interval=None).fit(
        module, datamodule=Data()
    )
    assert _get_current_dispatch_mode_stack() == []
    pickle.dumps(module.mean)
    assert not module._forward_hooks
    assert cost._counting is None


@pytest.mark.parametrize("place", [0, 1])
def test_no_batch_costs_nothing(place: int, tmp_path: Path) -> None:
    class Gaps(Data):
        def train_dataloader(self) -> DataLoader:
            batches: list[Any] = list(images(8, SIZE, seed=7).split(2))[:3]
            return DataLoader([*batches[:place], None, *batches[place:]], batch_size=None)  # type: ignore[arg-type]

    def flops(data: Data) -> int:
        cost, module = Cost(), Toy()
        module.net = nn.Linear(SIZE, SIZE)  # type: ignore[assignment]
        module.training_step = lambda batch, batch_idx: module.net(batch).sum()  # type: ignore[method-assign]
        trainer(tmp_path, cost, max_steps=3, limit_val_batches=0, val_check_interval=None).fit(module, datamodule=data)
        return cost.total.flops

    assert flops(Gaps()) == flops(Data()) > 0


class Labelled(Toy):
    """Two classes, said in one way or another."""

    def __init__(self, say: Any) -> None:
        super().__init__()
        self.say = say

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return super().validation_step(batch, batch_idx) | {"labels": self.say(batch % 2)}


def picture(folder: Path, say: Any) -> bytes:
    run = trainer(folder, SampleGrid(count=8, shots_on_top=False))
    run.validate(Labelled(say), datamodule=Data(), verbose=False)
    return next((folder / "samples").iterdir()).read_bytes()


def test_labels_are_read_or_said_to_be_left_out(tmp_path: Path) -> None:
    plain = picture(tmp_path / "plain", lambda labels: labels)
    without = picture(tmp_path / "none", lambda labels: None)
    assert plain != without
    for number, say in enumerate((lambda labels: labels.tolist(), lambda labels: labels[:, None])):
        assert picture(tmp_path / f"same{number}", say) == plain
    for number, say in enumerate((nn.functional.one_hot, lambda labels: labels.float(), lambda labels: "ab")):
        with pytest.warns(UserWarning, match=r"'labels' are left out, they are not \d+ whole numbers"):
            assert picture(tmp_path / f"wrong{number}", say) == without


def test_prompts_that_are_left_out_and_other_weights(tmp_path: Path) -> None:
    class Other(Toy):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
            return super().validation_step(batch, batch_idx) | {"prompts": ["one"], "weights": torch.ones(1)}

    with pytest.warns(UserWarning, match=r"'prompts' are left out, they are not a list of \d+ strings"):
        trainer(tmp_path, FID(TinyFeatures())).validate(Other(), datamodule=Data(), verbose=False)
    assert read_records(tmp_path / "metrics.jsonl")[0]["weights"] is None


def test_a_fit_that_evaluates_nothing_says_so_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Trains(pl.LightningModule):
        training_step, configure_optimizers = Averaged.training_step, Averaged.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(3, SIZE, SIZE))

    def said(**options: Any) -> list[str]:
        recwarn.clear()
        callbacks = FID(TinyFeatures(), stages=["test"]), FID(TinyFeatures(), name="own"), SampleGrid()
        trainer(tmp_path, *callbacks, val_check_interval=None, **options).fit(Trains(), datamodule=Data())
        return [str(one.message) for one in recwarn if "nothing is evaluated" in str(one.message)]

    (sentence,) = said()
    assert sentence.startswith("FID, FID, SampleGrid: nothing is evaluated in this fit, because it has no validation")
    assert said(limit_val_batches=0) == []  # as it was asked for


def test_every_second_picture_after_a_resume_too(tmp_path: Path) -> None:
    def pictures(*steps: int) -> list[str]:
        folder, last = tmp_path / f"{len(steps)}", None
        for step in steps:
            grids = SampleGrid(every_n_evaluations=2), SampleGrid(every_n_evaluations=3, name="rare")
            run = trainer(folder, *grids, max_steps=step, val_check_interval=1)
            run.fit(Toy(), datamodule=Data(), ckpt_path=last)
            last = str(folder / "last.ckpt")
            run.save_checkpoint(last)
        return sorted(path.name for path in (folder / "samples").iterdir())

    assert pictures(2, 3, 7) == pictures(7)


def test_another_size_is_found_before_anything_is_computed(tmp_path: Path) -> None:
    class Fixed(TinyFeatures):
        passes = 0

        def forward(self, images: Tensor) -> Tensor:
            Fixed.passes += 1
            return super().forward(images)

    fid = FID(Fixed(), reference=REFERENCE[..., :4])
    refused("samples are 8x8 but reference images are 8x4", trainer(tmp_path, fid).test, Toy(), datamodule=Data())
    assert Fixed.passes == 0


def test_ranks_without_seeds_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fid = FID(TinyFeatures())
    monkeypatch.setattr(fid, "warn_once", lambda message, once=None: seen.append(message))
    run, module = trainer(tmp_path, fid), Toy(extra=False)
    for world, said in ((1, 0), (2, 1)):
        seen.clear()
        others = SimpleNamespace(world_size=world)
        samples = SimpleNamespace(images=images(2, SIZE, seed=1), seeds=torch.arange(2), numbered=False,
                                  labels=None, prompts=None, weights=None)  # fmt: skip
        fid._size = (SIZE, SIZE)
        fid._collect(others, module, samples)  # type: ignore[arg-type]
        assert len([text for text in seen if "no 'seeds'" in text]) == said
    assert run.world_size == 1


def test_the_trainer_of_another_package_is_named(tmp_path: Path) -> None:
    class Trainer:
        """As of ``pytorch_lightning``, which has the same classes under another name."""

    refused("SoundCheckpoint is a checkpoint for lightning.pytorch.Trainer, got tests", SoundCheckpoint().setup,
            Trainer(), Toy(), "fit", error=TypeError)  # fmt: skip


def test_what_is_no_tensor_and_neither_true_nor_false_is_named() -> None:
    rows = torch.randn(3, 2)
    for features, real, named in ((rows.numpy(), True, "ndarray, True"), (rows, "yes", "Tensor, 'yes'")):
        refused(f"real True or False, got {named}", Frechet().update, features, real=real, error=TypeError)

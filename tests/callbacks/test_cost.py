"""What `Cost` counts, where it is written, and that a resumed run goes on counting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tests.worlds import Stream, fit, random_images, tiny_unet, unidad
from unidad_pl import Cost, Diffusion, LossBalance, UniDAD


def run(module: Any, steps: int, place: Path, cost: Cost, **options: Any) -> pl.Trainer:
    return fit(module, steps, callbacks=[cost], default_root_dir=place, **options)


@pytest.mark.slow
def test_iterations_of_one_kind_cost_the_same(tmp_path: Path) -> None:
    class EachOne(UniDAD):
        def iteration_kind(self) -> int:
            return int(self.iteration)

    first, second = Cost(), Cost()
    run(unidad(), 6, tmp_path, first)
    run(unidad(kind=EachOne), 6, tmp_path, second)
    assert len(first._of_kind) == 2  # with the student's update, and without
    assert first.total == second.total


def test_evaluations_follow_from_k_and_r(tmp_path: Path) -> None:
    cost = Cost()
    run(unidad(student__num_steps=3, student__update_every=2), 4, tmp_path, cost)
    seen = cost.total.evaluations
    assert seen["student"] == 3 * 4
    assert seen["source_teacher"] == 2
    assert seen["target_teacher"] == 2 + 2  # judging, and its own loss
    assert seen["fake_score"] == 4 * 2 + 2 * 2  # its loss and the critic's; judging and the student's adversarial loss
    assert cost.total.encoders["fake_score"] == 4 + 2
    written = json.loads((tmp_path / "cost.json").read_text())
    assert written["tflops"] == cost.tflops > 0
    assert written["evaluations"] == dict(seen)


def test_what_loss_balance_asks_for_is_not_the_trainings(tmp_path: Path) -> None:
    alone, beside = Cost(), Cost()
    run(unidad(student__update_every=1), 2, tmp_path, alone)
    fit(unidad(student__update_every=1), 2, callbacks=[LossBalance(1), beside], default_root_dir=tmp_path)
    assert alone.total == beside.total


def test_a_resumed_run_goes_on_counting_and_stages_add_up(tmp_path: Path) -> None:
    whole, half, rest = Cost(), Cost(), Cost(before=2.5)
    run(Diffusion(tiny_unet()), 4, tmp_path, whole)
    run(Diffusion(tiny_unet()), 2, tmp_path, half).save_checkpoint(tmp_path / "two.ckpt")
    run(Diffusion(tiny_unet()), 4, tmp_path, rest, ckpt_path=tmp_path / "two.ckpt")
    assert half.total.flops * 2 == rest.total.flops == whole.total.flops
    assert rest.tflops == pytest.approx(2.5 + whole.tflops)
    with pytest.raises(ValueError, match="before"):
        Cost(before=-1.0)


class Foreign(pl.LightningModule):
    """Somebody's own module: batches of their own, automatic optimisation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2)


def test_any_module_is_counted(tmp_path: Path) -> None:
    cost = Cost()
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", callbacks=[cost], default_root_dir=tmp_path, logger=False,
                         enable_progress_bar=False, enable_checkpointing=False)  # fmt: skip
    trainer.fit(Foreign())
    assert cost.total.flops == 3 * 2 * (2 * 2 * 4 * 3)  # forward, and the weights' gradient
    assert dict(cost.total.evaluations) == {"net": 3}
    assert trainer.callback_metrics["cost/tflops"] == pytest.approx(cost.tflops)


def test_an_error_leaves_no_counting_behind(tmp_path: Path) -> None:
    class Broken(Foreign):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            raise ZeroDivisionError

    cost = Cost()
    with pytest.raises(ZeroDivisionError):
        pl.Trainer(max_steps=1, accelerator="cpu", callbacks=[cost], default_root_dir=tmp_path, logger=False,
                   enable_progress_bar=False, enable_checkpointing=False).fit(Broken())  # fmt: skip
    assert cost._counting is None
    run(Diffusion(tiny_unet()), 1, tmp_path, Cost())


@pytest.mark.slow
def test_records_of_evaluations_say_what_was_spent(tmp_path: Path) -> None:
    from unidad_pl.callbacks import IntraLPIPS
    from unidad_pl.cartoons import CartoonFeatures

    judge = IntraLPIPS(CartoonFeatures(), shots=random_images(2))
    cost = Cost()
    often: dict[str, Any] = dict(limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None)
    fit(unidad(), 2, Stream(random_images(), seeds=4), callbacks=[cost, judge], default_root_dir=tmp_path, **often)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    spent = [record["tflops"] for record in records if record["step"]]
    assert 0 < spent[0] < spent[-1] == cost.tflops

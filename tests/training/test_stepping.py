"""The guard against non-finite losses and gradients, and the loss scale of 16-mixed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from tests import worlds
from tests.worlds import FAST, fit, optimizers, tiny_unet, weights_sha
from unidad_pl import Diffusion, OptimizerOptions, UniDAD
from unidad_pl.condition import Condition
from unidad_pl.training.stepping import spoil_gradients

unidad = partial(worlds.unidad, student__update_every=1)


def half(scale: float) -> dict[str, Any]:
    """``16-mixed`` on the CPU; Lightning makes bf16 of the plain word there."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def steps(trainer: Any) -> list[int]:
    return [int(next(iter(o.state.values()))["step"]) if o.state else 0 for o in trainer.optimizers]


class InfiniteLoss(UniDAD):
    """The student's loss overflows in iteration 1, its gradient stays finite."""

    def student_loss(self, x: torch.Tensor, *cond: Condition | None) -> torch.Tensor:
        loss = super().student_loss(x, *cond)
        return loss + float("inf") if int(self.iteration) == 1 else loss


def test_an_infinite_loss_with_finite_gradients_is_skipped_too() -> None:
    trainer = fit(unidad(kind=InfiniteLoss), 3)
    assert trainer.global_step == 3
    assert steps(trainer) == [2, 3, 3]
    assert trainer.logged_metrics["skipped/student"] == 1
    assert trainer.logged_metrics["skipped_in_all/student"] == 1
    assert "skipped_in_all/fake" not in trainer.logged_metrics


def test_a_finite_loss_changes_no_gradient() -> None:
    parameters = [torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(2, 2))]
    spoil_gradients(parameters, torch.tensor(3.0))  # no gradient yet
    parameters[1].grad = torch.full((2, 2), 0.1)
    spoil_gradients(parameters, torch.tensor(-3.0))
    assert torch.equal(parameters[1].grad, torch.full((2, 2), 0.1))
    spoil_gradients(parameters, torch.tensor(float("inf")))
    assert parameters[1].grad.isnan().tolist() == [[True, False], [False, False]]


class Watched(InfiniteLoss):
    """Keeps every logged number."""

    def log(self, name: str, value: Any, **options: Any) -> None:
        self.__dict__.setdefault("seen", {}).setdefault(name, []).append(float(value))


def test_every_group_is_unscaled_by_the_scale_its_loss_had() -> None:
    """Also in iteration 1, where the student, which steps first, overflows and makes the scale smaller."""
    still = OptimizerOptions(lr=0.0, warmup=0, clip=0.0, arguments={"weight_decay": 0.0})
    exact, scaled = (unidad(kind=Watched, **optimizers(still)) for _ in range(2))
    fit(exact, 2)
    trainer = fit(scaled, 2, **half(2.0**7))
    assert trainer.global_step == 2
    assert steps(trainer) == [1, 2, 2]
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**6
    for group in ("student", "fake", "target"):
        found, expected = (module.seen[f"grad_norm/{group}"] for module in (scaled, exact))
        assert found == pytest.approx(expected, rel=0.02, nan_ok=True)


def test_a_group_that_steps_twice_in_an_iteration_is_unscaled_twice() -> None:
    still = OptimizerOptions(lr=0.0, warmup=0, clip=0.0, arguments={"weight_decay": 0.0})
    twice = dict(target_teacher__adaptation__updates=2, **optimizers(still))
    exact, scaled = (unidad(kind=Watched, **twice) for _ in range(2))
    fit(exact, 1)
    assert steps(fit(scaled, 1, **half(2.0**7))) == [1, 1, 2]
    found, expected = (module.seen["grad_norm/target"] for module in (scaled, exact))
    assert len(found) == 2
    assert found == pytest.approx(expected, rel=0.02)


def test_an_overflow_in_a_later_step_of_a_group_halves_the_scale() -> None:
    class Late(UniDAD):
        """T's loss is infinite in its second update of an iteration."""

        def target_loss(self, *given: Any) -> torch.Tensor:
            loss = super().target_loss(*given)
            return loss * float("inf") if self._steps["target"] else loss

    trainer = fit(unidad(kind=Late, target_teacher__adaptation__updates=2), 2, **half(2.0**7))
    assert steps(trainer) == [2, 2, 2]
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**5


@pytest.mark.slow
def test_overflow_counts_as_a_skip_and_halves_the_scale_once_an_iteration() -> None:
    trainer = fit(unidad(), 2, **half(2.0**126))
    assert trainer.global_step == 2
    assert steps(trainer) == [0, 0, 0]
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**124
    with pytest.raises(RuntimeError, match="2 iterations in a row had a non-finite loss or gradient"):
        fit(unidad(training__max_skipped=2), 3, **half(2.0**126))


class Parts(Watched):
    """Keeps the loss of every micro-batch."""

    def denoise(self, network: Any, *given: Any) -> torch.Tensor:
        loss = super().denoise(network, *given)
        if network is self.fake_score:
            self.__dict__.setdefault("parts", []).append(float(loss))
        return loss


def test_what_is_logged_is_the_mean_over_micro_batches() -> None:
    module = unidad(kind=Parts, training__accumulate=2)
    fit(module, 2)
    parts = module.parts
    assert len(parts) == 4
    assert module.seen["loss/fake"][1::2] == pytest.approx([sum(parts[:2]) / 2, sum(parts[2:]) / 2])


def test_the_scale_is_resumed(tmp_path: Path) -> None:
    whole, first, resumed = (Diffusion(tiny_unet(), FAST) for _ in range(3))
    trainer = fit(whole, 4, **half(2.0**8))
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**9  # grown once, after three iterations
    fit(first, 2, **half(2.0**8)).save_checkpoint(tmp_path / "two.ckpt")
    trainer = fit(resumed, 4, ckpt_path=tmp_path / "two.ckpt", **half(2.0**4))
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**9
    assert weights_sha(resumed) == weights_sha(whole)

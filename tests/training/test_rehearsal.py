"""What is planned without weights is what runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.worlds import fit, tiny_unet, unidad
from unidad_pl import Cost
from unidad_pl.training.rehearsal import Plan

SMALL: dict[str, Any] = dict(source=tiny_unet(channels=(8,), attention_levels=()), student__num_steps=2)
OPTIONS: list[dict[str, Any]] = [
    dict(target_teacher__adaptation__pretrain=2, target_teacher__adaptation__until=4),
    dict(student__gradient="backward_simulation", target_teacher=None),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=["T first", "simulated"])
def test_a_budget_is_enough_for_what_was_planned_and_no_more(options: dict[str, Any], tmp_path: Path) -> None:
    cost = Cost()
    fit(unidad(**SMALL, **options), 6, callbacks=[cost], default_root_dir=tmp_path)
    plan = Plan(unidad(**SMALL, **options), 4)
    assert sum(plan.flops(number) for number in range(6)) == cost.total.flops
    assert plan.iterations_within(cost.tflops * (1 + 1e-9)) == 6
    assert plan.iterations_within(cost.tflops * (1 - 1e-9)) == 5
    assert plan.iterations_within(1e-9) == 1
    with pytest.raises(ValueError, match="tflops must be"):
        plan.iterations_within(0.0)

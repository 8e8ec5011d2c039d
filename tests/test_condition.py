"""Conditions: rows, devices, concatenation, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unidad_pl import Condition, NewUNet

TOKENS, POOLED = torch.randn(3, 5, 8), torch.randn(3, 4)


def test_every_part_goes_where_the_condition_goes() -> None:
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    whole = Condition(torch.tensor([0, 1, 2]), TOKENS, mask, POOLED)
    rows = whole[1:]
    assert len(rows) == 2
    for name, part in whole.parts.items():
        assert torch.equal(rows.parts[name], part[1:])
        assert torch.equal(Condition.cat([whole[:1], whole[torch.tensor([1, 2])]]).parts[name], part)
        assert torch.equal(whole[:1].expand(4).parts[name], torch.cat([part[:1]] * 4))
        assert whole.to("meta").parts[name].device.type == "meta"


def test_prompts_of_one_length_need_no_mask_and_others_get_one() -> None:
    short = Condition(tokens=TOKENS[:1, :2], pooled=POOLED[:1])
    assert Condition.cat([short, short]).mask is None
    both = Condition.cat([short, Condition(tokens=TOKENS, pooled=POOLED)])
    assert both.tokens is not None
    assert both.mask is not None
    assert both.mask.tolist() == [[True, True, False, False, False], *[[True] * 5] * 3]
    assert torch.equal(both.tokens[0, :2], TOKENS[0, :2])
    assert not both.tokens[0, 2:].any()
    masked = Condition(tokens=TOKENS, mask=both.mask[:3], pooled=POOLED)
    assert torch.equal(Condition.cat([masked, short]).mask, torch.cat([both.mask[:3], both.mask[:1]]))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "at least one part"),
        ({"labels": torch.zeros(2), "tokens": TOKENS}, "equally many rows"),
        ({"mask": torch.ones(3, 5)}, "that of its tokens"),
        ({"tokens": TOKENS, "mask": torch.ones(3, 4)}, "that of its tokens"),
        ({"tokens": TOKENS, "mask": torch.ones(3, 5, dtype=torch.int64)}, "must be bool, got torch.int64"),
        ({"tokens": torch.zeros(3)}, r"must be \[B, L, D\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Condition(**parts)


def test_conditions_that_do_not_go_together_are_refused() -> None:
    labels = Condition(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="different kinds"):
        Condition.cat([labels, Condition(tokens=TOKENS)])
    with pytest.raises(ValueError, match="2 conditions cannot become 3"):
        labels.expand(3)


@pytest.mark.parametrize("classes", [None, 4])
def test_a_network_says_which_condition_it_takes(classes: int | None) -> None:
    network = NewUNet(8, (8,), attention_levels=(), norm_groups=4, head_channels=8, num_classes=classes).build()
    x, sigma = torch.randn(2, *network.image_shape), torch.ones(2)
    labels = Condition(torch.tensor([1, 2]))
    assert network(x, sigma, network.blank_condition(2)).shape == x.shape
    for wrong in [Condition(tokens=TOKENS[:2]), labels if classes is None else None, labels[:1]]:
        with pytest.raises(ValueError, match="this network takes"):
            network(x, sigma, wrong)
        with pytest.raises(ValueError, match="this network takes"):
            network.taps(x, sigma, wrong)

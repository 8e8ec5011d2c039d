"""FLOPs against closed forms."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.worlds import tiny_unet
from unidad_pl.flops import Counting, Tally


def counted(work: object, **networks: nn.Module) -> Tally:
    counting = Counting(networks)
    counting.start()
    work()  # type: ignore[operator]
    return counting.stop()


def test_a_convolution_and_its_gradients() -> None:
    conv, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 8, 8, requires_grad=True)
    one = 2 * 2 * 8 * 8 * 5 * 3 * 9
    assert counted(lambda: conv(x)).flops == one
    assert counted(lambda: conv(x).sum().backward()).flops == 3 * one  # of the images and of the weights
    with torch.no_grad():
        assert counted(lambda: conv(x)).flops == one
    assert counted(lambda: conv(x.detach()).sum().backward()).flops == 2 * one


def test_attention_on_the_cpu_is_counted() -> None:
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    product = 2 * 2 * 3 * 16 * 16 * 8
    attention = nn.functional.scaled_dot_product_attention
    assert counted(lambda: attention(query, query, query)).flops == 2 * product
    assert counted(lambda: attention(query, query, query).sum().backward()).flops == 7 * product


def test_evaluations_and_those_of_the_encoder_alone() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    tally = counted(lambda: (network(torch.ones(1, 2)), network[0](torch.ones(1, 2))), network=network, none=nn.ReLU())
    assert dict(tally.evaluations) == {"network": 2}
    assert dict(tally.encoders) == {"network": 1}


def test_a_network_of_diffusers_as_torch_counts_it() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = tiny_unet().build()
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([1.0, 2.0])
    with sdpa_kernel(SDPBackend.MATH):  # plain products, which torch counts on a CPU too
        with FlopCounterMode(display=False) as theirs:
            network(x, sigma).square().sum().backward()
        assert counted(lambda: network(x, sigma).square().sum().backward()).flops == theirs.get_total_flops() > 1e6

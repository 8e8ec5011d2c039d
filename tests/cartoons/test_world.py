"""The procedural world: deterministic, independent of resolution and batch, the domains linked as promised."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from unidad_pl.cartoons.world import CATEGORIES, DOMAINS, RANGES, factors, render


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_image_depends_on_domain_and_index_alone(domain: str) -> None:
    many = render(range(40, 50), domain)
    assert many.shape == (10, 3, 32, 32)
    assert many.min() >= -1
    assert many.max() <= 1
    torch.testing.assert_close(render([47], domain)[0], many[7], atol=1e-6, rtol=0)
    assert (many[0] - many[1]).abs().mean() > 0.02


@pytest.mark.parametrize("domain", DOMAINS)
def test_antialiasing_agrees_across_resolutions(domain: str) -> None:
    """A fine render averaged down is the coarse render, up to what one pixel of coverage cannot tell."""
    fine = F.avg_pool2d(render(range(8), domain, 256), 8)
    assert (fine - render(range(8), domain, 32)).abs().mean() < 0.03


def test_the_same_person_puts_glasses_on() -> None:
    plain, worn = factors(range(100), "faces"), factors(range(100), "sunglasses")
    assert plain["glasses"].sum() == 0
    assert worn["glasses"].sum() == 100
    assert all(torch.equal(plain[k], worn[k]) for k in plain if k != "glasses")
    change = (render(range(100), "faces") - render(range(100), "sunglasses")).abs().amax(1)
    assert change[:, 26:].max() == 0  # shoulders stay
    assert change[:, 8:22].flatten(1).amax(1).min() > 0.3


def test_the_same_person_is_drawn_with_crayons() -> None:
    plain, drawn = factors(range(50), "faces"), factors(range(50), "sketches")
    assert all(torch.equal(plain[k], drawn[k]) for k in plain)
    flat, sketch = render(range(50), "faces"), render(range(50), "sketches")
    kernel = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]).expand(3, 1, 3, 3)
    edges = [F.conv2d(images, kernel, groups=3).abs().mean((1, 2, 3)) for images in (flat, sketch)]
    assert (edges[1] > 2 * edges[0]).all()  # the texture is new
    coarse = [F.avg_pool2d(images, 8).flatten(1) for images in (flat, sketch)]
    alike = torch.corrcoef(torch.cat(coarse))[:50, 50:]
    assert (alike.argmax(1) == torch.arange(50)).float().mean() > 0.9  # and it is still the same person


def test_factors_cover_their_values_evenly() -> None:
    seen = factors(range(4000), "faces")
    for name, values in CATEGORIES.items():
        if name in ("species", "glasses", "facial_hair"):
            continue
        counts = torch.bincount(seen[name], minlength=len(values)) / 4000
        assert (counts - 1 / len(values)).abs().max() < 0.03, name
    for name, (low, high) in RANGES.items():
        assert low <= seen[name].min() < seen[name].max() <= high
        assert float(seen[name].mean()) == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    pairs = torch.stack([seen["skin"], seen["hair_style"]]).float()
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.05


def test_first_image_is_fixed_for_good() -> None:
    """The assets were trained on this world: a change of a single pixel value must be noticed."""
    sums = [float(render([0, 1, 999_999], d, 32).double().sum()) for d in DOMAINS]
    assert sums == pytest.approx(FROZEN, abs=0.05)


FROZEN = [1713.245, 1134.787, 1750.442, 3450.433]


@pytest.mark.parametrize(("arguments", "message"), [
    (([0], "dogs", 32), "dogs"), (([-1], "faces", 32), "-1"), (([0], "faces", 4), "resolution"),
])  # fmt: skip
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(*arguments)

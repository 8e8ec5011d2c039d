"""The embedded feature network, judged on renders that it was not trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.metrics.toys import refused
from unidad_pl.cartoons import world
from unidad_pl.cartoons.features import ASSETS, CartoonFeatures, FactorNetwork
from unidad_pl.cartoons.world import visible
from unidad_pl.data.cartoon_labels import VALIDATION_START
from unidad_pl.metrics import frechet_distance
from unidad_pl.modules.factors import gaussian_blur

HELD_OUT = range(VALIDATION_START + 10_000, VALIDATION_START + 10_300)
TINY = {"categories": {"a": ["x", "y"], "b": ["x", "y", "z"]}, "ranges": {"c": [-1.0, 3.0]}, "channels": [8, 8]}


@pytest.fixture(scope="module")
def judge() -> CartoonFeatures:
    return CartoonFeatures()


@pytest.fixture(scope="module")
def renders() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    return {d: (world.render(HELD_OUT, d), world.factors(HELD_OUT, d)) for d in world.FLAT}


def _tiny(**changes: object) -> FactorNetwork:
    torch.manual_seed(0)
    return FactorNetwork(**(TINY | {"features": 4} | changes))  # type: ignore[arg-type]


def _noisy(images: Tensor, std: float) -> Tensor:
    return (images + std * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def test_asset_is_small_and_knows_the_cartoon_world(judge: CartoonFeatures) -> None:
    folder = ASSETS / "cartoon_features"
    assert (folder / "model.safetensors").stat().st_size <= 2**20
    assert all(t.dtype == torch.float16 for t in load_file(folder / "model.safetensors").values())
    assert judge.categories == {name: list(values) for name, values in world.CATEGORIES.items()}
    network = judge.load()
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in network.parameters())
    assert {name: network.ranges[name] for name in world.RANGES} == world.RANGES


@pytest.mark.parametrize("domain", world.FLAT)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_factors_of_held_out_renders(judge: CartoonFeatures, renders: dict, domain: str, noise: float) -> None:
    images, labels = renders[domain]
    found, shown = judge.predict(_noisy(images, noise)), visible(labels)
    for name, value in found.items():
        assert value.dtype == torch.int64
        assert value.shape == (300,)
        seen = shown[name]
        if seen.any():
            accuracy = float((value == labels[name])[seen].float().mean())
            assert accuracy >= _bar(name, noise), f"{name} in {domain} at noise {noise}: {accuracy:.3f}"


def _bar(name: str, noise: float) -> float:
    """What the README of the asset promises, less what 300 images may deviate by chance."""
    if name in ("species", "glasses"):
        return 0.995  # one of 300
    return 0.92 if noise else 0.95


@pytest.mark.parametrize("domain", world.FLAT)
def test_continuous_factors_of_held_out_renders(judge: CartoonFeatures, renders: dict, domain: str) -> None:
    images, labels = renders[domain]
    network, shown = judge.load(), visible(labels)
    found = {name: network.denormalise(name, value) for name, value in network(images).values.items()}
    for name, (low, high) in world.RANGES.items():
        if shown[name].any():
            error = float((found[name] - labels[name])[shown[name]].abs().mean())
            assert error < 0.1 * (high - low), f"{name} in {domain}: {error:.4f} of {high - low:.2f}"


@pytest.mark.parametrize("resolution", [48, 64])
def test_other_resolutions_show_the_same(judge: CartoonFeatures, resolution: int) -> None:
    for domain in world.FLAT:
        found = judge.predict(world.render(HELD_OUT[:60], domain, resolution))
        assert (found["glasses"] == int(domain == "sunglasses")).all()
        assert (found["species"] == int(domain == "cats")).all()


def test_frechet_distance_orders_noise_and_domains(judge: CartoonFeatures, renders: dict) -> None:
    faces = renders["faces"][0]
    real, other = judge(world.render(range(300), "faces")), judge(faces)
    noise = [frechet_distance(judge(_noisy(faces, std)), real) for std in (0.05, 0.1, 0.2)]
    sunglasses, cats = (frechet_distance(judge(renders[d][0]), real) for d in ("sunglasses", "cats"))
    floor = frechet_distance(other, real)
    assert floor < noise[0] < noise[1] < noise[2]
    assert 3 * floor < sunglasses < cats


def test_pooled_features_are_standardised_and_tell_how_bad_an_image_is(renders: dict) -> None:
    judge = CartoonFeatures(layer="pooled")
    real = {d: judge(world.render(range(300), d)) for d in world.FLAT}
    everything = torch.cat(list(real.values()))
    assert everything.shape == (900, judge.num_features)
    torch.testing.assert_close(everything.mean(0), torch.zeros(judge.num_features), atol=0.2, rtol=0)
    torch.testing.assert_close(everything.std(0), torch.ones(judge.num_features), atol=0.2, rtol=0)
    faces, soft = renders["faces"][0], lambda std: gaussian_blur(renders["faces"][0], torch.full((300,), std))
    floor = frechet_distance(judge(faces), real["faces"])
    noise = [frechet_distance(judge(_noisy(faces, std)), real["faces"]) for std in (0.05, 0.1, 0.2)]
    blur = [frechet_distance(judge(soft(std)), real["faces"]) for std in (0.45, 0.6, 0.9)]
    # no saturation: twice the damage, over twice the distance
    assert 3 * floor < noise[0] < noise[1] / 2 < noise[2] / 4
    assert 3 * floor < blur[0] < blur[1] / 2 < blur[2] / 4
    domains = [frechet_distance(judge(renders[d][0]), real["faces"]) for d in ("sunglasses", "cats")]
    assert 3 * floor < domains[0] < domains[1]


def test_features_do_not_depend_on_the_batch_and_follow_gradients(judge: CartoonFeatures, renders: dict) -> None:
    images = renders["faces"][0][:8]
    features = judge(images)
    assert features.shape == (8, judge.num_features)
    assert features.dtype == torch.float32
    torch.testing.assert_close(judge(images[3:4]), features[3:4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(judge(images.double()), features, atol=1e-6, rtol=0)
    leaf = images.clone().requires_grad_()
    judge(leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


def test_values_outside_of_the_range_are_clamped(judge: CartoonFeatures) -> None:
    images = 2 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(judge(images), judge(images.clamp(-1, 1)))


def test_extractor_is_light_and_in_no_checkpoint() -> None:
    judge = CartoonFeatures("/nowhere")
    assert judge.name == "cartoon_features"
    assert CartoonFeatures("/nowhere", layer="pooled").name == "cartoon_features-pooled"
    refused(r"layer.*'pool'", CartoonFeatures, layer="pool")
    judge = CartoonFeatures()
    judge.load()
    assert judge.load() is judge.load()
    assert not judge.state_dict()


def test_loading_at_first_use_leaves_no_trace() -> None:
    judge, state = CartoonFeatures(), torch.get_rng_state()
    with torch.inference_mode():
        judge(torch.zeros(1, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    judge(torch.zeros(1, 3, 32, 32, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 32, 32).byte()]
)
def test_wrong_images_are_refused(images: Tensor) -> None:
    refused(r"float images \[N, 3, H, W\]", _tiny(), images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_network_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    network = _tiny()
    network.save_pretrained(tmp_path, dtype)
    again = FactorNetwork.from_pretrained(tmp_path)
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(dtype).float())
    assert again.categories == network.categories
    assert again.ranges == network.ranges
    extractor = CartoonFeatures(str(tmp_path))
    assert extractor.categories == network.categories
    assert extractor.num_features == 4


def test_missing_files_are_named(tmp_path: Path) -> None:
    missing, load = FileNotFoundError, FactorNetwork.from_pretrained
    nothing = CartoonFeatures(str(tmp_path / "nothing"))
    refused(r"config\.json in folder .*nothing.*unidad fit --config", nothing.load, error=missing)
    refused(r"assets.no_such", getattr, CartoonFeatures("builtin:no_such"), "categories", error=missing)
    _tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(r"model\.safetensors", load, tmp_path, error=missing)


def test_loading_is_strict(tmp_path: Path) -> None:
    network, load = _tiny(), FactorNetwork.from_pretrained
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong, message in (
        (config | {"depth": 3}, r"missing \[\], unknown \['depth'\]"),
        ([], "JSON object"),
        (config | {"features": 5}, "has shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        refused(message, load, tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = network.state_dict()
    save_file(weights | {"extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    refused(r"unknown \['extra'\]", load, tmp_path)
    del weights["norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    refused(r"missing \['norm\.weight'\]", load, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"categories": {"a": ["x"]}}, {"ranges": {"c": [1, 1]}}, {"channels": [12]}, {"channels": []}, {"features": 0}],
)
def test_impossible_networks_are_refused(changes: dict[str, object]) -> None:
    refused("got", _tiny, **changes)


@pytest.mark.parametrize(
    "changes",
    [{"categories": {"a": ["x", "y"]}}, {"ranges": {"d": [0, 1], "e": [0, 1]}}, {"channels": [8]}, {"features": 6}],
)
def test_every_argument_changes_the_network(changes: dict[str, object]) -> None:
    before, after = _tiny().state_dict(), _tiny(**changes).state_dict()
    assert {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()}


def test_normalise_and_denormalise_are_inverse() -> None:
    network, value = _tiny(), torch.tensor([-1.0, 0.0, 3.0])
    assert network.normalise("c", value).tolist() == [-1.0, -0.5, 1.0]
    assert torch.equal(network.denormalise("c", network.normalise("c", value)), value)


@pytest.mark.parametrize(("name", "content"), [
    ("config.json", b""), ("config.json", b"[" * 10_000), ("config.json", b"\xff"), ("config.json", b"3"),
    ("config.json", b"version https://git-lfs.github.com/spec/v1\n"), ("model.safetensors", b"<html></html>"),
    ("config.json", b'{"categories": {"a": 3}, "ranges": {}, "channels": [16], "features": 8}'),
    ("config.json", b'{"categories": {}, "ranges": {}, "channels": [16], "features": 1e30}'),
    ("config.json", b'{"categories": {}, "ranges": {}, "channels": [1000000000000], "features": 8}'),
    ("model.safetensors", b""), ("model.safetensors", b"\xff" * 20),
])  # fmt: skip
def test_damaged_files_name_themselves_and_the_way_out(tmp_path: Path, name: str, content: bytes) -> None:
    place = tmp_path / "judge"
    shutil.copytree(CartoonFeatures().folder, place)
    (place / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}'.*") as raised:
        CartoonFeatures(str(place)).load()
    assert len(str(raised.value).splitlines()) == 1

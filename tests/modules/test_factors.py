"""Training of the feature network, on tiny settings, and the labelled data it learns from."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tests.worlds import fit
from unidad_pl import OptimizerOptions
from unidad_pl.cartoons import world
from unidad_pl.cartoons.features import CartoonFeatures, FactorNetwork
from unidad_pl.cartoons.world import visible
from unidad_pl.data.cartoon_labels import TRAIN_START, VALIDATION_START, CartoonDataModule, LabelledBatch
from unidad_pl.modules import factors
from unidad_pl.modules.factors import FactorTraining, gaussian_blur

TINY = {"channels": (8, 8, 8), "features": 8, "optimizer": OptimizerOptions(lr=1e-2, warmup=0)}
DATA = {"pool_size": 24, "val_size": 8, "batch_size": 6, "eval_batch_size": 8}


def _data(**changes: object) -> CartoonDataModule:
    return CartoonDataModule(**(DATA | changes))  # type: ignore[arg-type]


def _fit(module: FactorTraining, root: Path, steps: int = 2, **options: Any) -> pl.Trainer:
    often = dict(limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    return fit(module, steps, _data(), **(often | dict(default_root_dir=root) | options))


def _module(**changes: object) -> FactorTraining:
    return FactorTraining(**(TINY | changes))  # type: ignore[arg-type]


def _weights(module: FactorTraining) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.network.parameters()])


@pytest.fixture(scope="module", autouse=True)
def _fewer_renders() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "STANDARD", factors.STANDARD[:20])
        yield


Trained = tuple[FactorTraining, pl.Trainer, Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    module, root = _module(), tmp_path_factory.mktemp("run")
    return module, _fit(module, root), root


def test_two_steps_export_a_network_that_loads(trained: Trained) -> None:
    module, trainer, root = trained
    assert trainer.global_step == 2
    network = FactorNetwork.from_pretrained(root / "cartoon_features")
    assert network.categories == {name: list(values) for name, values in world.CATEGORIES.items()}
    assert network.ranges == world.RANGES | {"noise": (0.0, 0.15), "blur": (0.0, 0.7)}
    for name, tensor in module.network.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor.half().float())
    assert CartoonFeatures(str(root / "cartoon_features"))(torch.zeros(1, 3, 32, 32)).shape == (1, 8)


def test_curve_and_logged_metrics(trained: Trained) -> None:
    _, trainer, root = trained
    rows = list(csv.DictReader((root / "cartoon_features" / "curve.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(float(row["train_loss"]) > 0 and 0 <= float(row["val_accuracy"]) <= 1 for row in rows)
    logged = set(trainer.callback_metrics)
    assert {"val/accuracy/faces/skin", "val/accuracy/cats/fur", "val/error/sunglasses/tilt"} <= logged
    assert not {"val/accuracy/cats/skin", "val/accuracy/faces/fur", "val/accuracy/sunglasses/eye_colour"} & logged


def test_training_learns(tmp_path: Path) -> None:
    module = _module()
    _fit(module, tmp_path, 30, val_check_interval=15)
    assert module.curve[1][1] < module.curve[0][1]


def test_same_seed_same_weights_and_resume_continues(tmp_path: Path) -> None:
    whole, first, second = _module(), _module(), _module()
    _fit(whole, tmp_path / "a", 4)
    # the learning rate is constant, so that it does not know that this run stops early
    _fit(first, tmp_path / "b", 2).save_checkpoint(tmp_path / "half.ckpt")
    _fit(second, tmp_path / "c", 4, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(_weights(whole), _weights(second))
    assert whole.curve == second.curve


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": OptimizerOptions(lr=1e-3, warmup=0)},
        {"optimizer": OptimizerOptions(lr=1e-2, warmup=0, clip=1e-6, arguments={"eps": 1.0})},
        {"channels": (8, 8)}, {"features": 6}, {"value_weight": 1.0}, {"noise": 0.3}, {"blur": 0.2}, {"jitter": 0.0},
        {"seed": 1},
    ],
)  # fmt: skip
def test_every_argument_of_the_module_matters(tmp_path: Path, trained: Trained, changes: dict[str, object]) -> None:
    module = _module(**changes)
    _fit(module, tmp_path, limit_val_batches=0)
    before, after = _weights(trained[0]), _weights(module)
    assert before.shape != after.shape or not torch.equal(before, after)


def test_export_to_sets_the_folder(tmp_path: Path) -> None:
    _fit(_module(export_to=str(tmp_path / "x" / "y")), tmp_path, 1, limit_val_batches=0)
    FactorNetwork.from_pretrained(tmp_path / "x" / "y")
    assert not (tmp_path / "cartoon_features").exists()


@pytest.mark.parametrize("changes", [{"noise": 0.0}, {"blur": 0.0}, {"value_weight": 0.0}, {"jitter": -0.1}])
def test_impossible_amounts_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
        _module(**changes)


def test_hidden_factors_get_no_gradient() -> None:
    module = _module()
    module.configure_model()
    hides = {"cats": ("skin", "hair_style", "mouth"), "faces": ("fur", "coat"), "sunglasses": ("eye_colour",)}
    for domain, hidden in hides.items():
        module.zero_grad()
        labels = world.factors(range(6), domain)
        output = module.network(world.render(range(6), domain))
        module.loss(output, labels | {"noise": torch.zeros(6), "blur": torch.zeros(6)}).backward()
        for name, head in module.network.heads.items():
            touched = bool(next(head.parameters()).grad.abs().sum() > 0)  # type: ignore[union-attr]
            if name in hidden:
                assert not touched, f"{name} in {domain}"
            elif visible(labels)[name].any():
                assert touched, f"{name} in {domain}"


def test_damage_is_bounded_and_reported() -> None:
    module, images = _module(jitter=0.0), world.render(range(200), "faces")
    damaged, amounts = module.damaged(images, torch.Generator().manual_seed(0))
    assert damaged.abs().max() <= 1
    for name, largest in (("noise", 0.15), ("blur", 0.7)):
        assert amounts[name].min() == 0
        assert 0.9 * largest < amounts[name].max() <= largest
        assert 0.35 < float((amounts[name] == 0).float().mean()) < 0.65
    clean = (amounts["noise"] == 0) & (amounts["blur"] == 0)
    torch.testing.assert_close(damaged[clean], images[clean], atol=1e-6, rtol=0)


def test_blur_keeps_flat_images_and_means() -> None:
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(gaussian_blur(flat, torch.tensor([0.7])), flat)
    dot = torch.zeros(1, 1, 9, 9)
    dot[..., 4, 4] = 1
    blurred = gaussian_blur(dot, torch.tensor([0.6]))
    assert float(blurred.sum()) == pytest.approx(1.0)
    assert float(blurred[0, 0, 4, 5] / blurred[0, 0, 4, 4]) == pytest.approx(math.exp(-0.5 / 0.6**2))


# -- data ------------------------------------------------------------------------------------------------------------


def _rows(data: CartoonDataModule, count: int = 2) -> list[LabelledBatch]:
    stream = iter(data.train_dataloader())
    return [next(stream) for _ in range(count)]


def test_labels_belong_to_the_images() -> None:
    data = _data()
    batch = _rows(data)[0]
    pools = {d: world.render(range(TRAIN_START, TRAIN_START + 24), d) for d in world.FLAT}
    truth = {d: world.factors(range(TRAIN_START, TRAIN_START + 24), d) for d in world.FLAT}
    for row, image in enumerate(batch.images):
        domain = world.DOMAINS[int(batch.domain[row])]
        index = int((pools[domain] - image).abs().flatten(1).mean(1).argmin())
        assert (pools[domain][index] - image).abs().max() <= 1 / 255 + 1e-6
        assert all(truth[domain][name][index] == batch.labels[name][row] for name in truth[domain])


def test_validation_batches_are_held_out_and_of_one_domain() -> None:
    batches = list(_data().val_dataloader())
    assert [set(b.domain.tolist()) for b in batches] == [{0}, {1}, {2}]
    held_out = world.render(range(VALIDATION_START, VALIDATION_START + 8), "cats")
    assert (batches[2].images - held_out).abs().max() <= 1 / 255 + 1e-6


def test_stream_depends_on_seed_and_position_alone() -> None:
    small, large = _rows(_data(batch_size=3), 4), _rows(_data(batch_size=6), 2)
    assert torch.equal(torch.cat([b.images for b in small]), torch.cat([b.images for b in large]))
    assert not torch.equal(_rows(_data(seed=1))[0].images, large[0].images)


def test_sizes_and_domains() -> None:
    assert _rows(_data(batch_size=5))[0].images.shape == (5, 3, 32, 32)
    assert _rows(_data(resolution=16))[0].images.shape == (6, 3, 16, 16)
    data = _data(domains=["cats"], pool_size=1, val_size=5, eval_batch_size=3)
    assert [len(b.images) for b in data.val_dataloader()] == [3, 2]
    batch = _rows(data)[0]
    assert (batch.images == batch.images[0]).all()
    assert (batch.labels["species"] == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": []}, "at least one"), ({"domains": ["dogs"]}, "unknown cartoon domain"),
        ({"pool_size": 0}, "pool_size"), ({"val_size": 500_001}, "val_size"), ({"batch_size": 0}, "batch_size"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
    ],
)  # fmt: skip
def test_impossible_data_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _data(**changes)


def test_glasses_hide_eyes_and_open_mouths_the_sign_of_a_smile() -> None:
    labels = world.factors(range(50), "sunglasses")
    shown = visible(labels)
    assert not shown["eye_colour"].any()
    assert torch.equal(shown["smile"], labels["mouth"] == 0)
    assert shown["skin"].all()
    assert not shown["fur"].any()

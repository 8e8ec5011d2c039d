"""Modules in other people's Python: loaded without a config, given networks of their own, fed with plain batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.worlds import FAST, Layers, Stream, fit, groups, random_images, tiny_unet, unidad
from unidad_pl import (
    FID,
    Batch,
    DenoiserSource,
    Diffusion,
    FewShotDataModule,
    LogNormal,
    NewUNet,
    SamplingOptions,
    SoundCheckpoint,
    SubjectDataModule,
    TrainingOptions,
    UniDAD,
    export_student,
    load_export,
    load_student,
)  # fmt: skip
from unidad_pl.arguments import describe, known_classes, rebuild
from unidad_pl.data.batch import as_batch
from unidad_pl.denoiser import Codec, GivenDenoiser
from unidad_pl.training.hparams import defaults, refuse_changes

SEEDS = [0, 1, 2]


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# -- load_from_checkpoint, load_state_dict, load_student, export, without a config ----------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[UniDAD, Path]:
    module = unidad(student__sigma_max=20.0, matching__range=(0.1, 0.8))
    path = tmp_path_factory.mktemp("python") / "run" / "checkpoints" / "two.ckpt"
    fit(module, 2).save_checkpoint(path)
    return module, path


def test_a_checkpoint_is_enough_to_load_its_module(trained: tuple[UniDAD, Path]) -> None:
    module, path = trained
    loaded = UniDAD.load_from_checkpoint(path)
    assert same(loaded, module)
    assert loaded.iteration == 2
    assert torch.equal(loaded(SEEDS), module.sample(SEEDS))  # forward
    changed = UniDAD.load_from_checkpoint(path, **groups(student__num_steps=1, student__sigma_max=20.0))
    assert len(changed.sampler) == 1


def test_a_plain_model_too_with_options_that_are_classes(tmp_path: Path) -> None:
    module = Diffusion(tiny_unet(), FAST, lognormal=LogNormal(-1, 1), sampling=SamplingOptions("few_step", 2))
    fit(module, 1).save_checkpoint(tmp_path / "one.ckpt")
    loaded = Diffusion.load_from_checkpoint(tmp_path / "one.ckpt")
    assert same(loaded, module)
    assert loaded.lognormal == LogNormal(-1, 1)
    assert len(load_student(tmp_path / "one.ckpt").sampler) == 2


def test_weights_load_before_any_fit(trained: tuple[UniDAD, Path]) -> None:
    module, path = trained
    fresh = unidad(student__sigma_max=20.0)
    fresh.load_state_dict(torch.load(path, weights_only=True)["state_dict"])  # without the frozen teacher's
    assert same(fresh, module)
    with pytest.raises(RuntimeError, match="Missing key"):
        unidad().load_state_dict({})


def test_export_and_load_need_no_config_either(trained: tuple[UniDAD, Path], tmp_path: Path) -> None:
    module, path = trained
    student = load_student(path)
    assert module.ema is not None
    assert same(student.network, module.ema.module)
    assert student.sampler.sigmas == module.sampler.sigmas
    assert student.folder == path.resolve().parents[1]  # where the card looks for metrics.jsonl
    folder = export_student(str(path), str(tmp_path / "export"))
    assert same(load_export(folder).network, student.network)
    assert "num_steps: 3" in (folder / "README.md").read_text()


def test_a_class_in_a_checkpoint_is_looked_up_and_never_imported(trained: tuple[UniDAD, Path], tmp_path: Path) -> None:
    content = torch.load(trained[1], weights_only=True) | {"state_dict": {}, "optimizer_states": []}  # comes first
    for wanted in ("antigravity.Fly", "subprocess.Popen", "pathlib.Path"):
        content["unidad_pl"]["module"]["init_args"]["source"] = {"class_path": wanted, "init_args": {}}
        torch.save(content, tmp_path / "foreign.ckpt")
        for load in (UniDAD.load_from_checkpoint, load_student):
            with pytest.raises(ValueError, match=f"foreign.ckpt.*'{wanted}' is no class"):
                load(tmp_path / "foreign.ckpt")  # type: ignore[operator]
    for broken in ({}, {"unidad_pl": {}}, {"unidad_pl": {"module": 3}}, [1]):
        torch.save(broken, tmp_path / "foreign.ckpt")
        with pytest.raises(ValueError, match=r"foreign\.ckpt"):
            UniDAD.load_from_checkpoint(tmp_path / "foreign.ckpt")


def test_what_no_file_can_hold_is_asked_for(tmp_path: Path) -> None:
    network = tiny_unet().build()
    fit(unidad(source=network), 1).save_checkpoint(tmp_path / "one.ckpt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'source' of UniDAD.*load_from_checkpoint\(path, source=...\)"):
        UniDAD.load_from_checkpoint(tmp_path / "one.ckpt")
    assert UniDAD.load_from_checkpoint(tmp_path / "one.ckpt", source=network).iteration == 1


def test_described_and_rebuilt_is_the_same() -> None:
    known = known_classes(DenoiserSource)
    source = NewUNet(resolution=16, channels=(16, 24), attention_levels=(1,), head_channels=8, norm_groups=4)
    again = rebuild(describe(source), known)
    assert describe(again) == describe(source)
    assert again.build().image_shape == (3, 16, 16)
    options = TrainingOptions(seed=3, classes=[0, 2])
    assert rebuild(describe(options), {"unidad_pl.training.hparams.TrainingOptions": TrainingOptions}) == options


# -- an option that is younger than a checkpoint ---------------------------------------------------------------------


def test_a_checkpoint_that_lacks_an_option_goes_on_where_it_stands_at_its_default() -> None:
    module = unidad()
    from unidad_pl.training.hparams import flatten

    now = dict(flatten(module._given))
    standard = defaults(module._given, UniDAD.__init__)
    for name in ("student.gradient", "gan.lr", "matching.noise_table", "target_teacher.adaptation.until"):
        old = {key: value for key, value in now.items() if key != name}
        refuse_changes(old, now, (), standard)
        with pytest.raises(RuntimeError, match=f"{name} was '<not there>' and is now 'x'"):
            refuse_changes(old, now | {name: "x"}, (), standard)
        with pytest.raises(RuntimeError, match=f"{name} was .* and is now '<not there>'"):
            refuse_changes(now, old, (), standard)


# -- what a model and a batch may be ---------------------------------------------------------------------------------


def quick(module: pl.LightningModule, loader: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("kind", ["network", "function"])
def test_a_network_or_a_function_that_makes_one_is_a_model(kind: str) -> None:
    source = tiny_unet()
    torch.manual_seed(5)
    network = source.build()
    given: Any = network if kind == "network" else (lambda: network)
    module = unidad(source=given, student__init_from=given)
    fit(module, 1)
    assert same(module.source_teacher, network)
    assert module.student is not network
    for wrong in (3, NewUNet, "models/ffhq.pt"):
        with pytest.raises(TypeError, match="a model is given as a source"):
            UniDAD(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a Denoiser"):
        GivenDenoiser(lambda: nn.Linear(1, 1)).build()  # type: ignore[arg-type, return-value]


IMAGES = torch.rand(4, 3, 16, 16) * 2 - 1
LABELS = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("batch", "labels"),
    [
        (IMAGES, None),
        ([IMAGES], None),
        ((IMAGES, LABELS), LABELS),
        ([IMAGES, LABELS], LABELS),
        ({"images": IMAGES, "labels": LABELS}, LABELS),
        (Batch(IMAGES, LABELS), LABELS),
    ],
)
def test_batches_of_plain_tensors_are_read(batch: Any, labels: Tensor | None) -> None:
    read = as_batch(batch)
    assert torch.equal(read.images, IMAGES)
    assert (read.labels is None) if labels is None else torch.equal(read.labels, labels)  # type: ignore[arg-type]
    source = tiny_unet(num_classes=None if labels is None else 2)
    quick(Diffusion(source, FAST), DataLoader([batch, batch], batch_size=None))  # type: ignore[arg-type, list-item]


def test_prompts_are_read_and_anything_else_is_refused_with_the_contract() -> None:
    assert as_batch((IMAGES, ["a", "b", "c", "d"])).prompts == ["a", "b", "c", "d"]
    for wrong, seen in [
        ("images", "str"), (None, "NoneType"), ((IMAGES, LABELS, LABELS), "a tuple of a tensor"),
        ({"pixels": IMAGES}, "a dict of pixels: a tensor"), (IMAGES[0], r"a tensor \(3, 16, 16\)"), ([], "a list of"),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match=f"training batch is a float tensor of images.*Got {seen}"):
            as_batch(wrong)
    with pytest.raises(TypeError, match=r"floats in \[-1, 1\], got torch.uint8"):
        as_batch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_a_foreign_loader_trains() -> None:
    assert quick(unidad(), DataLoader(TensorDataset(IMAGES), batch_size=2)).global_step == 2


# -- a codec with weights --------------------------------------------------------------------------------------------


class Scaled(nn.Module, Codec):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def encode(self, images: Tensor) -> Tensor:
        return images * self.scale

    def decode(self, images: Tensor) -> Tensor:
        return images / self.scale


class Coded(NewUNet):
    def codec(self) -> Codec:
        return Scaled()


def test_a_codec_that_is_a_module_is_frozen_and_in_no_checkpoint(tmp_path: Path) -> None:
    shape = dict(channels=(8,), attention_levels=(), head_channels=8, norm_groups=4)
    build: Callable[[], UniDAD] = partial(unidad, Coded(resolution=16, **shape))  # type: ignore[arg-type]
    module = build()
    fit(module, 2).save_checkpoint(tmp_path / "two.ckpt")
    codec: Any = module.codec
    assert float(codec.scale) == 0.5
    assert not codec.scale.requires_grad
    assert not [name for name in torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"] if "codec" in name]
    assert fit(build(), 3, ckpt_path=tmp_path / "two.ckpt").global_step == 3


# -- divergence ------------------------------------------------------------------------------------------------------


class Spoilt(UniDAD):
    """A weight becomes ``value`` at iteration 7."""

    value = float("nan")

    def finish_iteration(self, sampled_network_updated: bool) -> None:
        super().finish_iteration(sampled_network_updated)
        if self.iteration == 7:
            with torch.no_grad():
                next(self.fake_score.parameters()).flatten()[0] = self.value


@pytest.mark.parametrize("value", [float("nan"), 4e19])
def test_no_checkpoint_is_written_of_diverged_weights(value: float, tmp_path: Path) -> None:
    keep = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_last=True)
    module = unidad(Layers(), kind=type("Now", (Spoilt,), {"value": value}), target_teacher=None)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=20, logger=False, callbacks=[keep], enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"weights have diverged: fake_score\.\S+ reached (nan|4e\+19)"):
        trainer.fit(module, Stream(random_images()))
    for path in tmp_path.glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        assert content["global_step"] == 6
        assert all(value.isfinite().all() for value in content["state_dict"].values())


class Skipping(UniDAD):
    """The student's loss is NaN in iterations 5 to 12."""

    def student_loss(self, x: Tensor, *cond: Tensor | None) -> Tensor:
        return super().student_loss(x, *cond) * (float("nan") if 5 <= self.iteration + 1 <= 12 else 1)


def test_no_checkpoint_is_written_while_updates_are_skipped(tmp_path: Path) -> None:
    keep = SoundCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    module = unidad(Layers(), kind=Skipping, student__update_every=1, target_teacher=None)
    fit(module, 15, callbacks=[keep], enable_checkpointing=True)
    assert {path.stem for path in tmp_path.iterdir()} == {"step=3", "step=15"}


def test_nothing_is_saved_at_the_end_of_a_run_that_skips_or_is_tried_out(tmp_path: Path) -> None:
    """Lightning saves ``last`` at the end where nothing has been saved before."""
    for name, steps, quick, kept in (("skips", 8, False, False), ("tried", 1, True, False), ("sound", 4, False, True)):
        keep = SoundCheckpoint(tmp_path / name, every_n_train_steps=100, save_last=True)
        module = unidad(Layers(), kind=Skipping, student__update_every=1, target_teacher=None)
        fit(module, steps, callbacks=[keep], enable_checkpointing=True, fast_dev_run=quick)
        assert (tmp_path / name / "last.ckpt").exists() == kept, name


def test_a_run_that_has_diverged_does_not_end_well() -> None:
    class Late(UniDAD):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                next(self.student.parameters()).flatten()[0] = float("inf")

    with pytest.raises(RuntimeError, match=r"diverged: student\.\S+ reached inf"):
        fit(unidad(Layers(), kind=Late), 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(student=None), "student must"), (dict(training={}), "training must be a TrainingOptions"),
        (dict(target_teacher={"weight": 0.5}), "target_teacher must be a TargetTeacherOptions, got {'weight': 0.5}"),
        (dict(gan="hinge"), "gan must be a GANOptions"), (dict(memory=3), "memory must be a MemoryOptions"),
    ],
    ids=str,
)  # fmt: skip
def test_groups_of_options_are_objects(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UniDAD(tiny_unet(), **options)


def test_groups_of_the_data_and_truth_values_too() -> None:
    for options, said in (
        (dict(reference="builtin:faces:20"), "reference must be a Reference, got 'builtin:faces:20'"),
        (dict(evaluation=None), "evaluation"), (dict(grey="no"), "grey must be true or false, got 'no'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            FewShotDataModule("builtin:cats", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kid must be true or false, got 'no'"):
        FID(nn.Flatten(), kid="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token must be words, got 'cat' and None"):
        SubjectDataModule("builtin:cats", class_word="cat", token=None)  # type: ignore[arg-type]


def test_training_images_of_another_range_are_warned_of() -> None:
    module = unidad()
    module.configure_model()
    with pytest.warns(UserWarning, match=r"training images are in \[200, 200\], and pictures must be in \[-1, 1\]"):
        list(module.micro_batches(torch.full((4, 3, 16, 16), 200.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(module.micro_batches(torch.full((4, 3, 16, 16), -1.0)))
    with pytest.raises(ValueError, match="a training batch is empty"):
        list(module.micro_batches(torch.zeros(0, 3, 16, 16)))


def test_what_is_no_seed_or_label() -> None:
    module = unidad(tiny_unet(num_classes=5))
    labels: Any
    for seeds, labels, said in (
        ([], None, "no seeds"), ([1.5], None, "seeds must be whole numbers, got torch.float32"),
        ([1], torch.tensor([True]), "1 images need 1 integer labels"), ([1], [1], "labels must be a tensor of 1 whole"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            module.sample(seeds, labels=labels)

"""A run goes on with the method it began with: another one is refused by name, another trainer is logged."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests import worlds
from tests.worlds import FAST, Stream, fit, random_images, tiny_unet
from unidad_pl import Diffusion, LogNormal, MemoryOptions, OptimizerOptions, SamplingOptions, UniDAD
from unidad_pl.arguments import differences
from unidad_pl.condition import Condition
from unidad_pl.training.module import RECORD

FASTER, UNET = OptimizerOptions(lr=5e-3, warmup=0), tiny_unet()
unidad = partial(worlds.unidad, student__update_every=1, training__ema_decay=0.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "two.ckpt"
    fit(unidad(), 2).save_checkpoint(path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student__num_steps": 2}, r"student.num_steps was 3 and is now 2"),
        ({"student__update_every": 3}, r"student.update_every was 1 and is now 3"),
        ({"student__gradient": "last"}, r"student.gradient was 'unroll' and is now 'last'"),
        ({"gan__loss": "hinge"}, r"gan.loss was 'bce' and is now 'hinge'"),
        ({"matching__range": (0.1, 0.9)}, r"matching.range was \[0.02, 0.98\] and is now \[0.1, 0.9\]"),
        ({"fake_score__optimizer": FASTER}, r"fake_score.optimizer.lr was 0.001 and is now 0.005"),
        ({"training__seed": 3}, r"training.seed was None and is now 3"),
        ({"source": tiny_unet(resolution=32)}, r"source.config.sample_size was 8 and is now 16"),
        ({"source": tiny_unet(sigma_data=0.7)}, r"source.spec.sigma_data was 0.5 and is now 0.7"),
        ({"student__init_from": UNET}, r"student.init_from was None and is now 'unidad_pl.backbones.unet.NewUNet'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_option_is_refused_with_both_values(saved: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        fit(unidad(**options), 4, ckpt_path=saved)


def test_another_resolution_is_refused_whatever_the_source_is_called(saved: Path) -> None:
    module = unidad()
    module.configure_model()
    module.student.image_shape = (3, 32, 32)
    with pytest.raises(RuntimeError, match=r"images of \[3, 16, 16\], this run's are \[3, 32, 32\]"):
        fit(module, 4, ckpt_path=saved)


def test_other_trainer_options_are_allowed_and_logged(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = unidad(training__accumulate=2, training__max_skipped=4, memory=MemoryOptions(checkpointing="steps"))
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        trainer = fit(module, 4, ckpt_path=saved, precision="bf16-mixed")
    assert trainer.global_step == 4
    for line in ("precision 'bf16-mixed'; the checkpoint was written with '32-true'", "accumulate 2;", "max_skipped 4;",
                 "memory.checkpointing 'steps'; the checkpoint was written with 'none'", "max_steps 4;"):  # fmt: skip
        assert line in caplog.text


def test_weights_may_be_used_with_other_options(saved: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.test(unidad(student__num_steps=2), Stream(random_images()), ckpt_path=saved, verbose=False)


def test_how_a_plain_model_is_sampled_may_change(tmp_path: Path) -> None:
    fit(Diffusion(tiny_unet(), FAST), 1).save_checkpoint(tmp_path / "one.ckpt")
    fit(Diffusion(tiny_unet(), FAST, sampling=SamplingOptions("ddim", 3)), 2, ckpt_path=tmp_path / "one.ckpt")
    with pytest.raises(RuntimeError, match=r"lognormal.mean was '<not there>' and is now -1.2"):
        fit(Diffusion(tiny_unet(), optimizer=FAST, lognormal=LogNormal()), 2, ckpt_path=tmp_path / "one.ckpt")


def test_the_row_of_skipped_steps_goes_on(tmp_path: Path) -> None:
    class Broken(UniDAD):
        def student_loss(self, x: torch.Tensor, *cond: Condition | None) -> torch.Tensor:
            return super().student_loss(x, *cond) * float("nan")

    broken = partial(unidad, kind=Broken, training__max_skipped=3)
    fit(broken(), 2).save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(RuntimeError, match=r"3 iterations in a row .* for 'student' \(now at iteration 2\)"):
        fit(broken(), 4, ckpt_path=tmp_path / "two.ckpt")


def test_what_is_stored_is_plain(saved: Path) -> None:
    stored = torch.load(saved, weights_only=True)[RECORD]
    assert stored["options"]["gan.reduction"] == "mean_logit"
    assert stored["image_shape"] == [3, 16, 16]
    assert stored["trainer"] == {"devices": 1, "precision": "32-true", "max_steps": 2}
    found = differences({"a": 1, "b": 2}, {"b": 3, "c": 4})
    assert found == {"a": (1, "<not there>"), "b": (2, 3), "c": ("<not there>", 4)}

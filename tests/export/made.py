"""Exports without a training: tiny students with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_sd import save_tiny
from unidad_pl.backbones import NewUNet, StableDiffusion
from unidad_pl.export import export_student
from unidad_pl.export import student as module
from unidad_pl.runs.student import TrainedStudent
from unidad_pl.sampling import FewStepSampler


def pixel_student(**options: Any) -> TrainedStudent:
    torch.manual_seed(0)
    small: dict[str, Any] = dict(resolution=8, channels=(8, 16), attention_levels=(), head_channels=8, norm_groups=4)
    network = NewUNet(**small | options).build()
    return TrainedStudent(
        network.requires_grad_(False), FewStepSampler(torch.tensor([80.0, 0.5])), 0.5, "ema", 7,
        [0, 2] if network.num_classes else None, {}, None,
    )  # fmt: skip


def text_student(folder: Path) -> TrainedStudent:
    source = StableDiffusion(str(save_tiny(folder / "sd")))
    network = source.build().requires_grad_(False)
    sampler = FewStepSampler(torch.tensor([14.0, 1.0])).fitted_to(network)
    return TrainedStudent(network, sampler, 0.5, "raw", 7, None, {}, None, source.codec(), "prt")


def export(student: TrainedStudent, out: Path, **options: Any) -> Path:
    """``unidad export`` of a checkpoint that holds ``student``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_student", lambda *_: student)
        return export_student("last.ckpt", str(out), **options)

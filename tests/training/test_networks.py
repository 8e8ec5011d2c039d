"""Memory options: the same gradients from less memory, and networks that stay where they were put."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worlds import Gaussian, Stream, fit, groups, random_images, tiny_unet, unidad
from unidad_pl import Diffusion, MemoryOptions, OptimizerOptions, UniDAD
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Prediction
from unidad_pl.training.networks import predict_on_own_device

STRONG: dict[str, Any] = dict(student__update_every=1, gan__student_weight=0.5, gan__critic_weight=0.5)


def trained(iterations: int = 2, precision: Any = "64-true", **options: Any) -> UniDAD:
    module = unidad(**(STRONG | options))
    fit(module, iterations, Stream(random_images(4)), precision=precision)
    return module


def difference(one: torch.nn.Module, two: torch.nn.Module) -> float:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("gradient", "kinds"),
    [("unroll", ("steps", "both")), ("last", ("both",)), ("backward_simulation", ("both",))],
)
def test_checkpointing_changes_no_gradient(gradient: Any, kinds: tuple[str, ...]) -> None:
    plain = trained(1, student__gradient=gradient)
    for kind in kinds:
        saving = trained(1, student__gradient=gradient, memory__checkpointing=kind)
        for name in ("student", "fake_score", "target_teacher", "discriminator"):
            assert difference(getattr(plain, name), getattr(saving, name)) < 1e-9, (kind, name)


def test_checkpointing_under_autocast() -> None:
    plain, saving = (trained(1, "bf16-mixed", memory__checkpointing=kind) for kind in ("none", "both"))
    assert difference(plain.student, saving.student) < 1e-4  # Adam's first step is +-1e-3 per weight


BLOCK = "down_blocks.0.resnets.0"


@pytest.mark.parametrize(
    ("kind", "layer", "calls"),
    [("none", "conv_in", 3), ("steps", "conv_in", 6), ("both", "conv_in", 6), ("none", BLOCK, 3), ("blocks", BLOCK, 6)],
)
def test_checkpointing_computes_the_student_twice(kind: str, layer: str, calls: int) -> None:
    module = unidad(memory__checkpointing=kind)
    module.configure_model()
    seen: list[int] = []
    module.student.unet.get_submodule(layer).register_forward_pre_hook(lambda *_: seen.append(1))
    module.draw_student_images(2, None).sum().backward()
    assert len(seen) == calls
    assert not module.source_teacher.unet.is_gradient_checkpointing


def test_teachers_in_bfloat16(tmp_path: Path) -> None:
    plain, half = (
        trained(1, target_teacher=None, precision="32-true", memory__teacher_dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    unet = half.source_teacher.unet
    assert unet.down_blocks[0].resnets[0].conv1.weight.dtype == torch.bfloat16
    assert unet.conv_out.weight.dtype == torch.float32
    assert half.student.unet.conv_in.weight.dtype == torch.float32
    x, sigma = torch.randn(4, 3, 16, 16), torch.tensor([0.1, 1.0, 10.0, 80.0])
    with torch.no_grad():
        exact, rounded = (m.source_teacher.predict(x * sigma.view(-1, 1, 1, 1), sigma) for m in (plain, half))
    assert rounded.eps.dtype == torch.float32
    assert 0 < (exact.eps - rounded.eps).abs().max() < 0.05
    assert difference(plain.student, half.student) > 0
    # the hash is that of the source's weights, so a run may change this option when it is resumed
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(unidad(target_teacher=None, **STRONG), 2, Stream(random_images(4)), ckpt_path=tmp_path / "half.ckpt")


@pytest.mark.parametrize(("of_teacher_and_ema", "of_student"), [("cpu", "meta"), ("meta", "cpu")])
def test_networks_with_a_place_of_their_own_stay_there(of_teacher_and_ema: str, of_student: str) -> None:
    own = MemoryOptions(teacher_device=of_teacher_and_ema, ema_device=of_teacher_and_ema)
    module = unidad(target_teacher=None, memory=own)
    module.configure_model()
    module.to(of_student)  # as Lightning moves a module to its GPU
    places = {n: next(getattr(module, n).parameters()).device.type for n in ("source_teacher", "student", "ema")}
    assert places == {"source_teacher": of_teacher_and_ema, "student": of_student, "ema": of_teacher_and_ema}
    assert {name.split(".")[0] for name in module.state_dict()} >= {"source_teacher", "ema"}


def test_arguments_travel_to_the_network_and_the_answer_back() -> None:
    class There(type(Gaussian(0.0).build())):  # type: ignore[misc]
        def predict(self, x: torch.Tensor, sigma: torch.Tensor, cond: Condition | None = None) -> Prediction:
            assert x.device == sigma.device == self.mu.device
            return super().predict(x, sigma, cond)

    network = There(0.3).to("meta")
    here = torch.zeros(2, 1, 8, 8, device="meta")
    assert predict_on_own_device(network, here, torch.ones(2, device="meta"), None).x0.device.type == "meta"
    with pytest.raises(NotImplementedError, match="meta"):  # it went there; from meta nothing comes back
        predict_on_own_device(network, torch.zeros(2, 1, 8, 8), torch.ones(2), None)


def test_options_are_checked() -> None:
    options = {f.name for f in dataclasses.fields(MemoryOptions)}
    assert options == {"checkpointing", "teacher_dtype", "teacher_device", "ema_device"}
    for name, value in (("checkpointing", "all"), ("teacher_dtype", "int8")):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            MemoryOptions(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"teacher_device must be a device .* got .moon."):
        MemoryOptions(teacher_device="moon")
    for memory in (MemoryOptions(checkpointing="blocks"), MemoryOptions(teacher_dtype="bfloat16")):
        module = UniDAD(Gaussian(0.0), **groups(target_teacher=None, memory=memory))
        with pytest.raises(ValueError, match="GaussianDenoiser"):
            module.configure_model()
    with pytest.raises(ValueError, match="do nothing here: there is no student and no frozen teacher"):
        Diffusion(tiny_unet(), memory=MemoryOptions(teacher_dtype="bfloat16"))
    module = Diffusion(tiny_unet(), memory=MemoryOptions(checkpointing="blocks"))
    module.configure_model()
    assert module.denoiser.unet.is_gradient_checkpointing


@pytest.mark.slow
def test_other_optimisers_by_class_path() -> None:
    plain, fused = (
        trained(precision="32-true", fake_score__optimizer=OptimizerOptions(lr=1e-3, warmup=0, arguments=arguments))
        for arguments in ({}, {"fused": True})
    )
    assert fused.optimizers()[1].defaults["fused"]
    assert difference(plain.fake_score, fused.fake_score) < 1e-5
    with pytest.raises(ValueError, match=r"bitsandbytes\.optim\.AdamW8bit.*pip install bitsandbytes"):
        trained(fake_score__optimizer=OptimizerOptions(algorithm="bitsandbytes.optim.AdamW8bit"))
    with pytest.raises(ValueError, match=r"torch\.optim\.Nothing"):
        trained(fake_score__optimizer=OptimizerOptions(algorithm="torch.optim.Nothing"))

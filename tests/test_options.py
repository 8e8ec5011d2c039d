"""Every number that a public class takes is checked where it is given, by name; and which optimisers can be used."""

from __future__ import annotations

import inspect
import math
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch

import unidad_pl
from unidad_pl import NewUNet, OptimizerOptions, metrics
from unidad_pl.backbones.spec import UNetSpec
from unidad_pl.data.cartoon_labels import CartoonDataModule
from unidad_pl.modules.factors import FactorTraining
from unidad_pl.schedules import karras, linear_abar, log_linear

BAD: list[Any] = [math.nan, math.inf, -math.inf, -1, 0, 1e30, 10**400, "a string", None, True]
REQUIRED: dict[str, dict[str, Any]] = {
    "ADMSource": {"checkpoint": "a.pt", "config": "adm256"},
    "AttributeShare": {"wanted": {"glasses": "dark"}},
    "Batch": {"images": torch.zeros(1, 3, 8, 8)},
    "Diffusion": {"source": NewUNet()},
    "ExportOptions": {"folder": "a"},
    "FewShotDataModule": {"root": "builtin:cats"},
    "FewStepSampler": {"sigmas": log_linear(2)},
    "Prior": {"root": "builtin:cats:4"},
    "StableDiffusion": {"path": "a"},
    "SubjectDataModule": {"root": "builtin:cats", "class_word": "cat", "shots": 4},
    "Transformer": {"path": "a"},
    "UniDAD": {"source": NewUNet()},
    "export_student": {"ckpt_path": "a.ckpt", "out": "a"},
    "log_linear": {"n": 2},
}
LEFT_OUT = {"Denoiser", "DenoiserSource", "GenerativeModule", "TrainedStudent", "SoundCheckpoint", "ManualDDPStrategy"}
"""Abstract, made by the package from what was checked, or with Lightning's own arguments."""
CLASSES = [getattr(unidad_pl, name) for name in unidad_pl.__all__ if name not in LEFT_OUT | {"__version__"}]
CLASSES = [one for one in CLASSES if isinstance(one, type)]
CLASSES += [UNetSpec, CartoonDataModule, FactorTraining, karras, log_linear, linear_abar]


def numbers_of(made: Any) -> dict[str, tuple[type, bool, int]]:
    """Argument -> int or float, whether it may be None, and how many of them it is a list of (0: it is none)."""
    own: Any = made.__init__ if isinstance(made, type) else made
    hints, found = get_type_hints(own), {}
    for name in inspect.signature(own).parameters:
        hint = hints.get(name)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        plain = [kind for kind in kinds if kind is not NoneType]
        inner = get_args(plain[0]) if get_origin(plain[0]) in (list, tuple) else ()
        kind = inner[0] if inner else plain[0]
        if len(plain) == 1 and kind in (int, float):
            found[name] = (kind, NoneType in kinds and not inner, len(inner) if inner and inner[-1] is kind else 0)
            if inner and not found[name][2]:
                found[name] = (kind, False, 1)
    return found


CASES = [(made, name) for made in CLASSES for name in numbers_of(made)]


def is_sound(value: Any, kind: type, optional: bool) -> bool:
    if value is None:
        return optional
    right = isinstance(value, int) if kind is int else isinstance(value, (int, float))
    limit = 2**63 if kind is int else 1e31
    return right and not isinstance(value, bool) and abs(value) < limit


@pytest.mark.parametrize(("made", "name"), CASES, ids=[f"{made.__name__}-{name}" for made, name in CASES])
def test_a_number_is_refused_by_name_or_makes_sense(made: Any, name: str) -> None:
    kind, optional, entries = numbers_of(made)[name]
    made(**REQUIRED.get(made.__name__, {}))  # the refusals below are not of something else
    for value in BAD:
        given = [value] * entries if entries else value
        try:
            made(**REQUIRED.get(made.__name__, {}) | {name: given})
        except (ValueError, TypeError) as error:
            sound = name in str(error)
        else:
            sound = is_sound(value, kind, optional)
        assert sound, given


def test_the_fuzz_finds_the_numbers() -> None:
    assert len(CASES) > 60
    assert numbers_of(unidad_pl.MatchingOptions)["range"] == (float, False, 2)
    assert numbers_of(unidad_pl.TrainingOptions)["seed"] == (int, True, 0)


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (unidad_pl.StudentOptions, "num_steps"), (unidad_pl.SamplingOptions, "num_steps"),
        (unidad_pl.TrainingOptions, "accumulate"), (unidad_pl.FewShotDataModule, "batch_size"),
        (unidad_pl.FewShotDataModule, "shots"), (unidad_pl.Evaluation, "val_samples"), (karras, "n"),
    ],
)  # fmt: skip
def test_what_would_never_end_is_refused(made: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        made(**REQUIRED.get(made.__name__, {}) | {name: 10**12})


@pytest.mark.parametrize("sigmas", [[math.nan], [math.inf, 1.0], [2.0, math.nan], [1.0, -1.0], []])
def test_a_sampler_wants_finite_sigmas(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="sigmas must be"):
        unidad_pl.FewStepSampler(torch.tensor(sigmas))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SGD", {"momentum": 0.9}), ("RMSprop", {}), ("Adagrad", {}), ("Adam", {}), ("AdamW", {"fused": True}),
        ("Adafactor", {}), ("NAdam", {}), ("Adamax", {}), ("Rprop", {}),
    ],
)  # fmt: skip
def test_optimizers_step(name: str, arguments: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    options = OptimizerOptions(lr=0.1, algorithm=f"torch.optim.{name}", arguments=arguments, warmup=0)
    optimizer, schedule = options.build(iter([weight]), 10)
    weight.grad = torch.ones(3)
    optimizer.step()
    schedule.step()
    assert weight.isfinite().all()
    assert (weight < 1).all()


@pytest.mark.parametrize(
    ("algorithm", "arguments", "path"),
    [
        ("torch.optim.LBFGS", {}, "optimizer.algorithm torch.optim.LBFGS .* without a closure"),
        ("torch.optim.SparseAdam", {}, "optimizer.algorithm torch.optim.SparseAdam .* dense gradients"),
        ("torch.nn.Linear", {}, "optimizer.algorithm torch.nn.Linear is no"),
        ("os.path.join", {}, "optimizer.algorithm os.path.join is no"),
        ("torch.optim.", {}, "there is no optimizer torch.optim."),
        (".SGD", {}, "optimizer.algorithm '.SGD' cannot be imported"),
        ("torch.optim.AdamW", {"weight_decay": -1}, "optimizer.arguments {weight_decay: -1}"),
        ("torch.optim.AdamW", {"weight_decay": math.inf}, "optimizer.arguments.weight_decay must be finite"),
        ("torch.optim.AdamW", {"betas": [2, 3]}, "optimizer.arguments {betas: "),
        ("torch.optim.AdamW", {"betas": [0.9, math.nan]}, "optimizer.arguments.betas must be finite"),
        ("torch.optim.SGD", {"momentum": "x"}, "optimizer.arguments {momentum: 'x'}"),
        ("torch.optim.SGD", {"momentum": math.nan}, "optimizer.arguments.momentum must be finite"),
        ("torch.optim.SGD", {"lr": 0.1}, "optimizer.arguments.lr is given already"),
        ("torch.optim.SGD", {"betas": [0, 1]}, "optimizer.arguments: torch.optim.SGD has no argument betas"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_by_path(
    algorithm: str, arguments: dict[str, Any], path: str
) -> None:
    with pytest.raises(ValueError, match=path):
        OptimizerOptions(algorithm=algorithm, arguments=arguments).build([torch.nn.Parameter(torch.zeros(2))], 10)


def test_arguments_are_names_and_values() -> None:
    with pytest.raises(ValueError, match="arguments must be"):
        OptimizerOptions(arguments=[1])  # type: ignore[arg-type]


def truths_of(made: Any) -> list[str]:
    """Arguments that are true or false."""
    own: Any = made.__init__ if isinstance(made, type) else made
    hints = get_type_hints(own)
    return [name for name in inspect.signature(own).parameters if hints.get(name) is bool]


TOLD = [*CLASSES, metrics.Frechet, metrics.LPIPSFeatures, metrics.TwoSample, unidad_pl.export_student]


@pytest.mark.parametrize(("made", "name"), [(made, name) for made in TOLD for name in truths_of(made)])
def test_a_word_is_neither_true_nor_false(made: Any, name: str) -> None:
    needed = REQUIRED.get(made.__name__, {})
    with pytest.raises(ValueError, match=f"{name} must be true or false, got 'no'"):
        made(**needed | {name: "no"})

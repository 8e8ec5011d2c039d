"""One iteration of Uni-DAD: who gets which gradient, what every option does, resuming, accumulation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.worlds import Stream, fit, groups, random_images, tiny_unet, unidad, weights_sha
from unidad_pl import Condition, MemoryOptions, OptimizerOptions, UniDAD
from unidad_pl.training.networks import frozen

NETWORKS = ("source_teacher", "target_teacher", "fake_score", "student", "discriminator")


def grads(module: UniDAD) -> set[str]:
    return {n for n in NETWORKS if any(p.grad is not None for p in getattr(module, n).parameters())}


@pytest.fixture
def built() -> UniDAD:
    module = unidad()
    module.configure_model()
    return module


@pytest.fixture
def ready(built: UniDAD, monkeypatch: pytest.MonkeyPatch) -> UniDAD:
    """A module whose losses can be called without a trainer."""
    monkeypatch.setattr(built, "log", lambda *a, **k: None)
    monkeypatch.setattr(built, "manual_backward", lambda loss, **k: loss.backward(**k))
    return built


def test_each_loss_reaches_its_own_group_and_nothing_else(ready: UniDAD) -> None:
    real = torch.rand(2, 3, 16, 16) * 2 - 1
    x = ready.draw_student_images(2, None)
    ready.backward_into(ready.student_loss(x, None), "student")
    assert grads(ready) == {"student"}
    ready.student.zero_grad()
    ready.backward_into(ready.fake_loss(x.detach(), real, None), "fake")
    assert grads(ready) == {"fake_score", "discriminator"}
    ready.fake_score.zero_grad()
    ready.discriminator.zero_grad()
    ready.backward_into(ready.target_loss(real, None), "target")
    assert grads(ready) == {"target_teacher"}


def test_no_graph_is_kept_for_the_networks_that_only_judge(ready: UniDAD) -> None:
    loss = ready.student_loss(ready.draw_student_images(2, None), None)
    loss.backward()  # without inputs=: whatever still required gradients would now get one
    assert grads(ready) == {"student"}


def test_the_source_teacher_never_changes_and_never_trains(built: UniDAD) -> None:
    before = weights_sha(built.source_teacher)
    for name in ("student", "fake_score", "target_teacher"):  # the first iteration starts every network at the source
        assert weights_sha(getattr(built, name)) == before
    built.requires_grad_(True)  # what un-froze the teachers in the released code
    built.train()
    fit(built, 3)
    assert weights_sha(built.source_teacher) == before
    assert all(p.grad is None for p in built.source_teacher.parameters())
    assert not built.source_teacher.training
    assert built.student.training


def test_frozen_restores_every_flag_even_after_an_error() -> None:
    net = tiny_unet().build()
    first = next(net.parameters())
    first.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]

    def fails() -> None:
        with frozen(net):
            assert not any(p.requires_grad for p in net.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [p.requires_grad for p in net.parameters()] == flags


class Counting(UniDAD):
    """Notes which group stepped in which iteration."""

    def step(self, group: str) -> bool:
        self.__dict__.setdefault("steps_seen", []).append((int(self.iteration), group))
        return super().step(group)


@pytest.mark.parametrize(
    ("adaptation", "target"),
    [({}, [0, 3]), (dict(update="every"), [0, 1, 2, 3, 4, 5]), (dict(update="every", until=2), [0, 1])],
)
def test_who_steps_when(adaptation: dict[str, Any], target: list[int]) -> None:
    options = {f"target_teacher__adaptation__{name}": value for name, value in adaptation.items()}
    module = unidad(kind=Counting, student__update_every=3, **options)
    assert fit(module, 6).global_step == int(module.iteration) == 6
    seen = module.__dict__["steps_seen"]
    for group, steps in (("fake", [0, 1, 2, 3, 4, 5]), ("student", [0, 3]), ("target", target)):
        assert [i for i, g in seen if g == group] == steps


FIRST: dict[str, Any] = dict(target_teacher__adaptation__update="every", student__update_every=1)


def test_adapting_first_moves_t_alone_and_starts_the_others_from_it() -> None:
    still = OptimizerOptions(lr=0.0, warmup=0)
    first = dict(target_teacher__adaptation__pretrain=3, target_teacher__adaptation__until=3) | FIRST
    for steps in (3, 5):
        module = unidad(student__optimizer=still, fake_score__optimizer=still, training__ema_decay=0.5, **first)
        module.configure_model()
        source, updates = weights_sha(module.source_teacher), module.updates_of("target", steps)
        trainer = fit(module, steps)
        assert (trainer.global_step, int(module.iteration), updates) == (steps, steps, 3)
        target = weights_sha(module.target_teacher)
        assert target != source
        assert module.ema is not None
        begun = {weights_sha(n) for n in (module.student, module.fake_score, module.ema.module)}
        assert begun == ({source} if steps == 3 else {target})


def test_networks_that_a_run_is_too_short_for_are_named(recwarn: pytest.WarningsRecorder) -> None:
    module = UniDAD(tiny_unet(), **groups(target_teacher__adaptation__pretrain=3, target_teacher__adaptation__until=3))
    fit(module, 3)
    with pytest.warns(UserWarning, match="student and fake: not trained in the 3 iterations"):
        module.configure_optimizers()
    fit(module, 6)  # the last one updates the student
    recwarn.clear()
    module.configure_optimizers()
    assert not recwarn.list


def test_a_run_resumed_where_the_others_start_goes_on_the_same(tmp_path: Path) -> None:
    whole, half, rest = (unidad(target_teacher__adaptation__pretrain=2, **FIRST) for _ in range(3))
    fit(whole, 4)
    fit(half, 2).save_checkpoint(tmp_path / "two.ckpt")
    fit(rest, 4, ckpt_path=tmp_path / "two.ckpt")
    assert weights_sha(rest) == weights_sha(whole)


def test_the_optimisers_count_their_own_steps() -> None:
    module = unidad(student__update_every=3, student__optimizer=OptimizerOptions(lr=1.0, warmup=4))
    trainer = fit(module, 6)
    student, fake, target = trainer.optimizers
    assert [int(next(iter(o.state.values()))["step"]) for o in (student, fake, target)] == [2, 6, 2]
    assert student.param_groups[0]["lr"] == pytest.approx(3 / 4)  # two steps done: the third would use 3/4


def train_sha(iterations: int = 2, **options: Any) -> str:
    module = unidad(**options)
    fit(module, iterations)
    return weights_sha(module)


OTHER, FASTER = tiny_unet(sigma_data=0.7), OptimizerOptions(lr=2e-3, warmup=0)
EXACT: list[tuple[str, Any]] = [
    ("source", tiny_unet(layers=2)),
    ("student__num_steps", 2), ("student__sigma_max", 40.0), ("student__sigma_min", 1.0),
    ("student__gradient", "last"), ("student__gradient", "backward_simulation"), ("student__update_every", 1),
    ("student__init_from", OTHER), ("student__optimizer", FASTER),
    ("fake_score__init_from", OTHER), ("fake_score__optimizer", FASTER),
    ("target_teacher", None), ("target_teacher__weight", 0.75), ("target_teacher__init_from", OTHER),
    ("target_teacher__adaptation", None), ("target_teacher__adaptation__pretrain", 1),
    ("target_teacher__adaptation__until", 1), ("target_teacher__adaptation__update", "every"),
    ("target_teacher__adaptation__updates", 2), ("target_teacher__adaptation__low_noise_share", 0.5),
    ("target_teacher__adaptation__optimizer", FASTER),
    ("matching", None), ("matching__source_weight", 1.0), ("matching__range", (0.3, 0.5)),
    ("matching__normalizer", "noisy"),
    ("denoising__weighting", "eps"), ("denoising__sigma_data", 1.0),
    ("gan", None), ("gan__student_weight", 0.3), ("gan__critic_weight", 0.5), ("gan__taps", ["in1", "mid"]),
    ("gan__kind", "patch"), ("gan__reduction", "per_head"), ("gan__loss", "hinge"), ("gan__loss", "lsgan"),
    ("gan__loss", "wgan"), ("gan__noise", "shared"), ("gan__sigma_max", 5.0), ("gan__r1", 1.0),
    ("gan__gradient_penalty", 1.0), ("gan__lr", 1e-2),
    ("training__seed", 1), ("training__accumulate", 2), ("training__ema_decay", 0.1),
]  # fmt: skip
ELSEWHERE = {
    "matching__noise_table", "training__max_skipped", "training__classes",  # below
    "matching__guidance_scale", "matching__negative_prompt",  # test_text_to_image.py
    "memory",  # training/test_networks.py
}  # fmt: skip
STRONG = dict(gan__student_weight=0.1, gan__critic_weight=0.2)
FROM_OTHER = dict(target_teacher__init_from=OTHER)


def base_of(name: str) -> dict[str, Any]:
    """What a run with the option is compared with, where the defaults do not show it."""
    if name == "target_teacher__adaptation":
        return FROM_OTHER
    return dict(target_teacher=None) if name == "matching" else STRONG if name.startswith("gan__") else {}


# At the student's first update all networks are the source: what these weigh is zero until its second one.
SEEN_LATER = {
    "target_teacher__weight", "target_teacher__adaptation__until", "matching__source_weight", "matching__range",
    "matching__normalizer", "training__ema_decay",
}  # fmt: skip
BASES: dict[str, str] = {}
"""Weights of the runs without a change, by their length and options."""


def test_every_constructor_argument_is_tested() -> None:
    import dataclasses
    import inspect

    def names(prefix: str, options: Any) -> set[str]:
        if not dataclasses.is_dataclass(options) or isinstance(options, (OptimizerOptions, MemoryOptions)):
            return {prefix}
        fields = [names(f"{prefix}__{f.name}", getattr(options, f.name)) for f in dataclasses.fields(options)]
        return set().union(*fields)

    arguments = list(inspect.signature(UniDAD.__init__).parameters.values())[1:]
    wanted = set().union(*(names(argument.name, argument.default) for argument in arguments))
    tested = {name for name, _ in EXACT}
    assert wanted <= tested | ELSEWHERE
    assert tested - wanted == {"target_teacher", "target_teacher__adaptation", "matching", "gan"}  # null, too


@pytest.mark.parametrize(("name", "value"), EXACT, ids=lambda v: v if isinstance(v, str) else "")
def test_every_argument_changes_what_is_trained(name: str, value: Any) -> None:
    base, iterations = base_of(name), 3 if name in SEEN_LATER else 2
    key = f"{iterations} {base}"
    if key not in BASES:
        BASES[key] = train_sha(iterations, **base)
    assert train_sha(iterations, **copy.deepcopy(base | {name: value})) != BASES[key]


def test_noise_table_of_the_model() -> None:
    vp = tiny_unet(prediction="epsilon")
    module = unidad(vp, matching__noise_table="model")
    module.configure_model()
    assert module.sigmas.shape == (1000,)
    assert float(module.sigmas[999]) == pytest.approx(157.4, rel=1e-3)
    assert train_sha(source=vp, matching__noise_table="model") != train_sha(source=vp)
    with pytest.raises(ValueError, match="karras"):
        unidad(matching__noise_table="model").configure_model()


def test_training_is_deterministic_whatever_random_state_it_starts_in() -> None:
    first = train_sha(2)
    torch.manual_seed(123)
    assert train_sha(2) == first


class Broken(UniDAD):
    """Non-finite student gradients from iteration 2 on."""

    until: int = 10**9

    def student_loss(self, *given: Any) -> torch.Tensor:
        loss = super().student_loss(*given)
        return loss * float("nan") if 2 <= int(self.iteration) < self.until else loss


@pytest.mark.slow
def test_a_non_finite_gradient_skips_only_its_own_step_and_finally_stops_the_run() -> None:
    module: Any = unidad(kind=Broken, student__update_every=1, training__max_skipped=3)
    module.until = 4
    trainer = fit(module, 6)
    assert trainer.global_step == 6
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    assert int(next(iter(trainer.optimizers[0].state.values()))["step"]) == 4
    with pytest.raises(RuntimeError, match=r"3 iterations in a row had a non-finite loss or gradient for 'student'"):
        fit(unidad(kind=Broken, student__update_every=1, training__max_skipped=3), 8)


def test_non_finite_images_do_not_poison_any_weight() -> None:
    class Poisoned(UniDAD):
        def draw_student_images(self, batch: int, cond: Any) -> torch.Tensor:
            x = super().draw_student_images(batch, cond)
            return x * float("inf") if int(self.iteration) == 1 else x

    module = unidad(kind=Poisoned, student__update_every=1)
    assert fit(module, 3).global_step == 3
    assert all(bool(torch.isfinite(t).all()) for t in module.state_dict().values())


def test_sample_17_is_the_same_in_any_batch() -> None:
    module = unidad()
    fit(module, 4)  # two student steps: the average starts as a copy
    alone = module.sample([17])
    in_batch = module.sample(range(15, 22))[2]
    torch.testing.assert_close(alone[0], in_batch, atol=1e-5, rtol=0)
    assert alone.abs().max() <= 1
    assert not torch.equal(module.sample([17], weights="raw"), module.sample([17], weights="ema"))
    with pytest.raises(ValueError, match="ema_decay"):
        unidad(training__ema_decay=0.0).sample([1], weights="ema")


def test_image_gradients_of_the_loss_terms_add_up(ready: UniDAD) -> None:
    ready.keep_image_gradients = True
    x = ready.draw_student_images(2, None)
    (total,) = torch.autograd.grad(ready.student_loss(x, None), x)
    assert set(ready.image_gradients) == {"dmd_source", "dmd_target", "adversarial"}
    torch.testing.assert_close(sum(ready.image_gradients.values()), total)


def test_image_gradients_of_micro_batches_are_rows_of_the_whole() -> None:
    class Kept(UniDAD):
        """Keeps the gradient of the student's loss with respect to the images of each micro-batch."""

        def student_loss(self, x: torch.Tensor, *cond: Any) -> torch.Tensor:
            loss = super().student_loss(x, *cond)
            self.__dict__.setdefault("rows", []).append(torch.autograd.grad(loss, x, retain_graph=True)[0])
            return loss

    module: Any = unidad(kind=Kept, training__accumulate=2)
    module.keep_image_gradients = True
    fit(module, 1)
    assert {len(rows) for rows in module.image_gradients.values()} == {4}
    torch.testing.assert_close(sum(module.image_gradients.values()), torch.cat(module.rows) / 2)
    fit(module, 1)  # of its iterations the second one updates no student
    assert module.image_gradients == {}


@pytest.mark.parametrize(("pretrain", "r"), [(0, 1), (0, 5), (3, 5), (5, 5), (1, 5), (7, 3)])
def test_updates_are_foreseen(pretrain: int, r: int) -> None:
    adaptation = {
        "target_teacher__adaptation__pretrain": pretrain,
        "target_teacher__adaptation__until": max(pretrain, 8),
    }
    module = unidad(student__update_every=r, **adaptation)
    for last in (1, 5, 8, 11):
        real = [i for i in range(pretrain, last) if i % r == 0]
        assert module.updates_of("student", last) == len(real)
        assert module.updates_of("fake", last) == max(0, last - pretrain)
        assert module.updates_of("target", last) == min(pretrain, last) + sum(i < 8 for i in real)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_teacher__weight": 1.5}, r"target_teacher\.weight.*1\.5"),
        ({"target_teacher__weight": 0.0}, "target_teacher: null instead"),
        ({"student__update_every": 0}, "update_every"),
        ({"matching__source_weight": 0.0, "target_teacher": None}, "source_weight is 0 and target_teacher null"),
        ({"matching__range": (0.5, 0.1)}, r"range .*\[0\.5, 0\.1\]"),
        ({"target_teacher__adaptation": None}, "init_from"),
        ({"target_teacher__adaptation__update": "evry"}, "update must be one of student, every"),
        ({"matching__noise_table": "ddpm"}, "noise_table"),
        ({"matching__normalizer": "x"}, "normalizer"),
        ({"matching__negative_prompt": "blurred"}, "negative_prompt 'blurred' does nothing without guidance"),
        ({"denoising__weighting": "x"}, "weighting"),
        ({"target_teacher__init_from": tiny_unet(), "matching": None}, "target_teacher does nothing"),
        ({"matching": None, "target_teacher": None, "gan": None}, "the student has no loss"),
        ({"matching": None, "target_teacher": None, "gan__student_weight": 0.0}, "the student has no loss"),
        ({"gan__critic_weight": 0.0}, "gan: null is no discriminator"),
        ({"target_teacher__adaptation__until": 0}, "until"),
        ({"target_teacher__adaptation__low_noise_share": 1.5}, "low_noise_share"),
        ({"target_teacher__adaptation__updates": 0}, "updates"),
        ({"target_teacher__adaptation__pretrain": -1}, "pretrain"),
        ({"target_teacher__adaptation__pretrain": 2, "student__init_from": tiny_unet()}, "pretrain"),
        ({"target_teacher__adaptation__pretrain": 3, "target_teacher__adaptation__until": 2}, "until to 3 or more"),
        ({"target_teacher__adaptation__updates": 2, "training__accumulate": 2}, "accumulate: 1"),
        ({"student__num_steps": 0}, "num_steps must be a whole number in"),
        ({"student__gradient": "lats"}, "lats"),
        ({"training__accumulate": 0}, "accumulate"),
        ({"training__ema_decay": 1.0}, "ema_decay"),
        ({"training__ema_decay": 0.0, "memory__ema_device": "cpu"}, "does nothing without an average"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unidad(**options)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"gan__taps": ["in9"]}, 16, r"in9.*in0, in1"),
        ({}, 32, r"32.*16"),
        ({"training__accumulate": 3}, 16, r"batch of 4.*accumulate=3"),
    ],
    ids=["unknown tap", "images of another size", "uneven micro-batch"],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(unidad(**options), 1, Stream(random_images(size=size)))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of four iterations."""
    path = tmp_path_factory.mktemp("saved") / "four.ckpt"
    fit(unidad(), 4).save_checkpoint(path)
    return path


def test_four_and_two_iterations_equal_six(four: Path) -> None:
    six, resumed = unidad(), unidad()
    assert fit(six, 6).global_step == 6
    fit(resumed, 6, ckpt_path=four)
    assert weights_sha(resumed) == weights_sha(six)
    saved = torch.load(four, weights_only=True)
    assert not any(k.startswith("source_teacher.") for k in saved["state_dict"])
    assert len(saved["optimizer_states"]) == 3


def test_another_teacher_is_refused_on_resume(four: Path, built: UniDAD) -> None:
    next(built.source_teacher.parameters()).data.add_(1e-3)
    with pytest.raises(RuntimeError, match="another 'source_teacher'"):
        fit(built, 8, ckpt_path=four)


def test_a_checkpoint_of_another_set_of_frozen_networks_is_refused(four: Path) -> None:
    other = unidad(target_teacher__adaptation=None, target_teacher__init_from=tiny_unet(sigma_data=0.7))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(RuntimeError, match=r"\['source_teacher'\].*\['source_teacher', 'target_teacher'\]"):
        trainer.test(other, Stream(random_images()), ckpt_path=four)


@pytest.mark.parametrize("gradient", ["unroll", "last"])
def test_autocast_loses_no_gradient(gradient: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights cast under no_grad first must not come out of autocast's cache without a graph."""
    module = unidad(student__update_every=1, student__gradient=gradient)
    seen: dict[str, int] = {}
    real_step = UniDAD.step

    def step(self: UniDAD, group: str) -> bool:
        seen[group] = sum(p.grad is None for settings in self.groups()[group] for p in settings["params"])
        return real_step(self, group)

    monkeypatch.setattr(UniDAD, "step", step)
    fit(module, 1, precision="bf16-mixed")
    assert seen == {"student": 0, "fake": 0, "target": 0}


def test_unsupported_precision_is_refused() -> None:
    with pytest.raises(RuntimeError, match="bf16-mixed"):
        fit(unidad(), 1, precision="bf16-true")


def test_missing_and_unexpected_weights_are_refused_on_resume(four: Path, tmp_path: Path) -> None:
    saved = torch.load(four, weights_only=True)
    saved["state_dict"].pop("student.unet.conv_in.weight")
    torch.save(saved, tmp_path / "broken.ckpt")
    with pytest.raises(RuntimeError, match=r"student\.unet\.conv_in\.weight"):
        fit(unidad(), 5, ckpt_path=tmp_path / "broken.ckpt")


def test_class_conditional_models_take_labels() -> None:
    module = UniDAD(tiny_unet(attention_levels=(), num_classes=3))
    module.configure_model()
    labels = torch.tensor([0, 2])
    assert module.draw_student_images(2, Condition(labels)).shape == (2, 3, 16, 16)
    assert not torch.equal(module.sample([4], torch.tensor([0])), module.sample([4], torch.tensor([1])))
    every = module.sample([3, 4, 5])  # without labels: the classes in turn
    torch.testing.assert_close(every, module.sample([3, 4, 5], torch.tensor([0, 1, 2])))
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2, .* got 1 to 3"):
        module.sample([4, 5], torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="2 images need 2 integer labels"):
        module.sample([4, 5], torch.tensor([1]))


def test_all_networks_see_the_same_labels_of_the_chosen_classes() -> None:
    seen: dict[str, list[int]] = {}
    module = unidad(tiny_unet(attention_levels=(), num_classes=4), training__classes=[1, 3])
    module.configure_model()
    for name in ("student", "fake_score", "source_teacher", "target_teacher"):
        network = getattr(module, name)
        network.unet.class_embedding.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].tolist())
        )
    fit(module, 1)
    labels = seen["student"][0]
    assert set(labels) <= {1, 3}
    for name, drawn in seen.items():
        assert all(part in (labels, labels + labels) for part in drawn), name
    assert len(seen) == 4
    assert module.labels.of_seeds(torch.arange(3)).tolist() == [1, 3, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("classes", "conditional", "message"),
    [([4], True, r"some of 0\.\.3, got \[4\]"), ([], True, "some of"), ([0], False, "the model is unconditional")],
)
def test_wrong_classes_are_refused(classes: list[int], conditional: bool, message: str) -> None:
    module = unidad(tiny_unet(attention_levels=(), num_classes=4 if conditional else None), training__classes=classes)
    with pytest.raises(ValueError, match=message):
        module.configure_model()

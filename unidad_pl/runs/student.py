"""From a checkpoint back to its trained few-step network, without the teachers and without the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from unidad_pl.arguments import known_classes, rebuild
from unidad_pl.checks import check_choices, check_positive
from unidad_pl.denoiser import Codec, Denoiser, DenoiserSource
from unidad_pl.files import BrokenFile, expanded, reading
from unidad_pl.runs.checkpoints import read_checkpoint
from unidad_pl.runs.config import build_module, find_config, read_config
from unidad_pl.sampling import FewStepSampler
from unidad_pl.schedules import log_linear
from unidad_pl.training.module import RECORD, GenerativeModule
from unidad_pl.training.networks import content_hash

Weights = Literal["auto", "ema", "raw"]


@dataclass
class TrainedStudent:
    """A few-step generator and where it comes from.

        >>> from unidad_pl import load_student
        >>> student = load_student("RUN/checkpoints/last.ckpt")  # doctest: +SKIP
        >>> images = student.sampler(student.network, noise)  # doctest: +SKIP

    Attributes:
        network: the student, in eval mode, on the CPU.
        sampler: its trained steps.
        sigma_min: smallest sigma for other numbers of steps.
        weights: ``ema`` or ``raw``.
        iteration: iterations it was trained for.
        classes: class labels of its run; None: unconditional.
        config: the run's config as plain data; empty if it is not known.
        folder: the run's folder, with ``metrics.jsonl``; None if it is not known.
        codec: between the network and pictures and prompts.
        token: the rare word that names the subject of its run; None: it has none.
    """

    network: Denoiser
    sampler: FewStepSampler
    sigma_min: float
    weights: str
    iteration: int
    classes: list[int] | None
    config: dict[str, Any]
    folder: Path | None
    codec: Codec = field(default_factory=Codec)
    token: str | None = None

    def with_steps(self, num_steps: int | None) -> FewStepSampler:
        """The sampler for ``num_steps`` network evaluations; None: as trained."""
        if num_steps is None or num_steps == len(self.sampler):
            return self.sampler
        sigmas, own = self.sampler.sigmas, self.network.own_sigmas(len(self.sampler))
        standard = own is not None and torch.allclose(torch.tensor(own), torch.tensor(sigmas))
        others = log_linear(num_steps, sigmas[0], self.sigma_min)
        return FewStepSampler(others, standard=standard).fitted_to(self.network)


def read_run(ckpt_path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint as plain data, on the CPU; code in it is never run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, carries code, or is no Lightning checkpoint.
    """
    content = read_checkpoint(ckpt_path)
    for entry in ("state_dict", RECORD):
        if not isinstance(content, dict) or not isinstance(content.get(entry), dict):
            raise ValueError(f"{str(ckpt_path)!r} is no checkpoint of unidad_pl's modules: it has no {entry}")
    state, iteration = content["state_dict"], content[RECORD].get("iteration")
    strange = [name for name, value in state.items() if not isinstance(name, str) or not torch.is_tensor(value)]
    if strange or type(iteration) is not int or not isinstance(content.get("frozen_sha256", {}), dict):
        what = f"its state_dict has no tensor at {strange[0]!r}" if strange else f"it is of iteration {iteration!r}"
        raise BrokenFile(f"{str(ckpt_path)!r} is no checkpoint of unidad_pl's modules: {what}; take another one")
    return content


def refuse_non_finite(network: nn.Module, name: str, way_out: str = "take a checkpoint from before") -> None:
    """Refuse a network with a weight that is not finite.

    Raises:
        ValueError: ``name``, how many tensors, and the first.
    """
    bad = [k for k, v in network.state_dict().items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        raise ValueError(f"{name} has NaN or infinity in {len(bad)} of its tensors, {bad[0]} the first: {way_out}")


def load_student(ckpt_path: str | Path, weights: Weights = "auto", config: str | None = None) -> TrainedStudent:
    """The trained network of a checkpoint of :class:`~unidad_pl.modules.UniDAD`, or of a few-step ``Diffusion``.

    Args:
        ckpt_path: the checkpoint.
        weights: ``ema``, ``raw`` or ``auto`` (ema where the checkpoint has it).
        config: the run's config; None: :func:`find_config`.

    Raises:
        FileNotFoundError: checkpoint or config is missing, or the source model, whose config gives the architecture.
        ValueError: they cannot be read or do not fit each other (names keys), an average that is not there, or a
            module that has no few-step sampler. Or weights or sigmas that are not finite.
    """
    check_choices(weights=(weights, Weights))
    ckpt_path, config = expanded(ckpt_path), config and str(expanded(config))
    content = read_run(ckpt_path)
    state, (module, settings, place) = content["state_dict"], _module_of(content, ckpt_path, config)
    if not isinstance(module, GenerativeModule):
        raise ValueError(f"{type(module).__name__} in {str(place)!r} is not one of unidad_pl's modules")
    sampler, sigma_min = module.few_step()
    averaged = any(name.startswith("ema.module.") for name in state)
    if weights == "ema" and not averaged:
        raise ValueError(f"{str(ckpt_path)!r} has no average of the weights (ema_decay was 0): use weights: raw")
    chosen = "ema" if averaged and weights != "raw" else "raw"
    prefix = "ema.module." if chosen == "ema" else f"{module.sampled_name}."
    network = module.sampled_source.build()
    base = content.get("frozen_sha256", {}).get(module.sampled_name)
    if network.shared_weights and base != content_hash(network, network.shared_weights):
        raise ValueError(
            f"the adapters were trained over a base with sha256 {str(base)[:16]}..., the source in {str(place)!r} is "
            f"another one: point its path at the model the run started with"
        )
    own = {name: value for name, value in network.state_dict().items() if name in network.shared_weights}
    own |= {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"the weights {prefix}* in {str(ckpt_path)!r} do not fit {str(place)!r}: {error}") from error
    refuse_non_finite(network, f"the student in {str(ckpt_path)!r}")
    sampler = sampler.fitted_to(network)
    for sigma in (*sampler.sigmas, sigma_min):
        check_positive(**{f"sigmas of {str(place)!r}": sigma})
    classes = list(range(network.num_classes)) if network.num_classes is not None else None
    return TrainedStudent(
        network.eval().requires_grad_(False), sampler, sigma_min, chosen, content[RECORD]["iteration"],
        module.classes or classes, settings, place.parent, module.sampled_source.codec(), _token(content),
    )  # fmt: skip


def _token(content: dict[str, Any]) -> str | None:
    """The subject's rare word, as the data module noted it."""
    states = [state for state in content.values() if isinstance(state, dict) and "class_word" in state]
    return next((state["token"] for state in states if isinstance(state.get("token"), str)), None)


def _module_of(content: dict[str, Any], ckpt_path: str | Path, config: str | None) -> tuple[Any, dict[str, Any], Path]:
    """The module that wrote a checkpoint, not built yet, its config, and a file or folder in its run folder."""
    try:
        place = find_config(ckpt_path, config)
    except FileNotFoundError:
        if config is not None:
            raise
        with reading(ckpt_path, "checkpoint with its module's arguments", "give the config of its run as well"):
            import unidad_pl.modules  # noqa: F401 (so that its classes are known)

            described = content[RECORD]["module"]
            module = rebuild(described, known_classes(DenoiserSource, GenerativeModule))
        return module, {"model": described}, Path(ckpt_path).resolve().parent
    settings = read_config(place)
    return build_module(settings, str(place)), settings, place

"""From a checkpoint back to its trained few-step network, without the teachers and without the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unidad_pl.arguments import known_classes, rebuild
from unidad_pl.checks import check_choices
from unidad_pl.denoiser import Codec, Denoiser, DenoiserSource
from unidad_pl.files import reading
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
        return FewStepSampler(log_linear(num_steps, self.sampler.sigmas[0], self.sigma_min)).fitted_to(self.network)


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
    return content


def load_student(ckpt_path: str | Path, weights: Weights = "auto", config: str | None = None) -> TrainedStudent:
    """The trained network of a checkpoint of :class:`~unidad_pl.modules.UniDAD`, or of a few-step ``Diffusion``.

    Args:
        ckpt_path: the checkpoint.
        weights: ``ema``, ``raw`` or ``auto`` (ema where the checkpoint has it).
        config: the run's config; None: :func:`find_config`.

    Raises:
        FileNotFoundError: checkpoint or config is missing, or the source model, whose config gives the architecture.
        ValueError: they cannot be read or do not fit each other (names keys), an average that is not there, or a
            module that has no few-step sampler.
    """
    check_choices(weights=(weights, Weights))
    content = read_run(ckpt_path)
    state, (module, settings, place) = content["state_dict"], _module_of(content, ckpt_path, config)
    if not isinstance(module, GenerativeModule):
        raise ValueError(f"{type(module).__name__} in {str(place)!r} is not one of unidad_pl's modules")
    sampler, sigma_min = module.few_step()
    averaged = any(name.startswith("ema.module.") for name in state)
    if weights == "ema" and not averaged:
        raise ValueError(f"{str(ckpt_path)!r} has no average of the weights (ema_decay was 0): use --weights raw")
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
    classes = list(range(network.num_classes)) if network.num_classes is not None else None
    return TrainedStudent(
        network.eval().requires_grad_(False), sampler.fitted_to(network), sigma_min, chosen,
        content[RECORD]["iteration"], module.classes or classes, settings, place.parent, module.sampled_source.codec(),
    )  # fmt: skip


def _module_of(content: dict[str, Any], ckpt_path: str | Path, config: str | None) -> tuple[Any, dict[str, Any], Path]:
    """The module that wrote a checkpoint, not built yet, its config, and where that was found: beside it, or in it."""
    try:
        place = find_config(ckpt_path, config)
    except FileNotFoundError:
        if config is not None:
            raise
        with reading(ckpt_path, "checkpoint with its module's arguments", "give the run's config as well (--config)"):
            import unidad_pl.modules  # noqa: F401 (so that its classes are known)

            described = content[RECORD]["module"]
            return (
                rebuild(described, known_classes(DenoiserSource, GenerativeModule)),
                {"model": described},
                Path(ckpt_path),
            )
    settings = read_config(place)
    return build_module(settings, str(place)), settings, place

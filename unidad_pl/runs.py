"""From a checkpoint back to its trained few-step network, without the teachers and without the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unidad_pl.checkpoints import read_checkpoint
from unidad_pl.denoiser import Codec, Denoiser
from unidad_pl.modules.optimization import content_hash
from unidad_pl.sampling import FewStepSampler

CONFIG_FILE = "config.yaml"


@dataclass
class TrainedStudent:
    """A few-step generator and where it comes from.

    Attributes:
        network: the student, in eval mode, on the CPU.
        sampler: its trained steps.
        sigma_end: smallest sigma for other numbers of steps.
        weights: ``ema`` or ``raw``.
        iteration: iterations it was trained for.
        classes: class labels of its run; None: unconditional.
        config: the run's config as plain data; empty if it is not known.
        folder: the run's folder, with ``metrics.jsonl``; None if it is not known.
        codec: between the network and pictures and prompts.
    """

    network: Denoiser
    sampler: FewStepSampler
    sigma_end: float
    weights: str
    iteration: int
    classes: list[int] | None
    config: dict[str, Any]
    folder: Path | None
    codec: Codec = field(default_factory=Codec)

    def with_steps(self, steps: int | None) -> FewStepSampler:
        """The sampler for ``steps`` network evaluations; None: as trained."""
        from unidad_pl.schedules import log_linear

        if steps is None or steps == len(self.sampler):
            return self.sampler
        return FewStepSampler(log_linear(steps, self.sampler.sigmas[0], self.sigma_end)).fitted_to(self.network)


def find_config(ckpt_path: str | Path, config: str | None = None) -> Path:
    """The config of the run a checkpoint belongs to: ``config``, or ``config.yaml`` beside or above it.

    Raises:
        FileNotFoundError: there is none.
    """
    places = [Path(config)] if config else [p / CONFIG_FILE for p in list(Path(ckpt_path).resolve().parents)[:2]]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"the config of {str(ckpt_path)!r} is not in {' nor '.join(str(p) for p in places)}: give it as --config"
    )


def load_module(config: str | Path) -> Any:
    """The LightningModule a run's config describes; its networks are not built yet.

    Raises:
        ValueError: the file is no config with a ``model``, or its values are refused.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(config).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{str(config)!r} is not YAML: {error}") from error
    return build_module(content, str(config))


def merge_configs(configs: list[Any]) -> Any:
    """Configs on top of each other: entries of later ones win, mappings are merged."""
    merged: Any = {}
    for config in configs:
        both = isinstance(merged, dict) and isinstance(config, dict)
        merged = (
            merged | {k: merge_configs([merged[k], v]) if k in merged else v for k, v in config.items()}
            if both
            else config
        )
    return merged


def build_module(config: Any, name: str) -> Any:
    """The LightningModule of a config that was read already; ``name`` is what errors call it.

    Raises:
        ValueError: it has no ``model``, or its values are refused.
    """
    import lightning.pytorch as pl
    from jsonargparse import ArgumentError, ArgumentParser

    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{name!r} is no config of a run: it has no entry 'model'")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    try:
        return parser.instantiate_classes(parser.parse_object({"model": config["model"]})).model
    except ArgumentError as error:
        raise ValueError(f"the model in {name!r} is refused: {error}") from error


def read_weights(ckpt_path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint as plain data, on the CPU; code in it is never run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, carries code, or is no Lightning checkpoint.
    """
    content = read_checkpoint(ckpt_path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"{str(ckpt_path)!r} is no Lightning checkpoint: it has no state_dict")
    return content


def _check_base(network: Denoiser, seen: str | None, place: Path) -> None:
    """Raise ``ValueError`` if a network's adapters were trained over another base."""
    if network.shared_weights and seen != content_hash(network, network.shared_weights):
        raise ValueError(
            f"the adapters were trained over a base with sha256 {str(seen)[:16]}..., the source in {str(place)!r} is "
            f"another one: point its path at the model the run started with"
        )


def load_student(ckpt_path: str | Path, weights: str = "auto", config: str | None = None) -> TrainedStudent:
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
    import yaml

    if weights not in ("auto", "ema", "raw"):
        raise ValueError(f"weights must be auto, ema or raw, got {weights!r}")
    content = read_weights(ckpt_path)
    state = content["state_dict"]
    place = find_config(ckpt_path, config)
    module = load_module(place)
    few_step = getattr(module, "few_step", None)
    if few_step is None:
        raise ValueError(f"{type(module).__name__} in {str(place)!r} is not one of unidad_pl's modules")
    sampler, sigma_end = few_step()
    averaged = any(name.startswith("ema.module.") for name in state)
    if weights == "ema" and not averaged:
        raise ValueError(f"{str(ckpt_path)!r} has no average of the weights (ema_decay was 0): use --weights raw")
    chosen = "ema" if averaged and weights != "raw" else "raw"
    prefix = "ema.module." if chosen == "ema" else f"{module.sampled_name}."
    network = module.sampled_source.build()
    _check_base(network, content.get("frozen_sha256", {}).get(module.sampled_name), place)
    own = {name: value for name, value in network.state_dict().items() if name in network.shared_weights}
    own |= {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"the weights {prefix}* in {str(ckpt_path)!r} do not fit {str(place)!r}: {error}") from error
    classes = list(range(network.num_classes)) if network.num_classes is not None else None
    return TrainedStudent(
        network.eval().requires_grad_(False), sampler.fitted_to(network), sigma_end, chosen, int(state["iteration"]),
        module.classes or classes, yaml.safe_load(place.read_text()), place.parent,
        module.sampled_source.codec(),
    )  # fmt: skip

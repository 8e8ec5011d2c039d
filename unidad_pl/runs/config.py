"""The config of a run: found beside its checkpoint, merged, and made a module again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONFIG_FILE = "config.yaml"


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


def read_config(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: it is not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML: {error}") from error


def merge_configs(configs: list[Any]) -> Any:
    """Configs on top of each other: entries of later ones win, mappings are merged."""
    merged: Any = {}
    for config in configs:
        if isinstance(merged, dict) and isinstance(config, dict):
            merged = merged | {k: merge_configs([merged[k], v]) if k in merged else v for k, v in config.items()}
        else:
            merged = config
    return merged


def build_module(config: Any, name: str) -> Any:
    """The LightningModule of a config, its networks not built yet; ``name`` is what errors call it.

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

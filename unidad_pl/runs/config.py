"""The config of a run: found beside its checkpoint, merged, and made a module again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unidad_pl.files import BrokenFile, reading

CONFIG_FILE = "config.yaml"
EVENTS = "events.out.tfevents."
"""How TensorBoard's files begin."""
LOGGER: dict[str, Any] = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "init_args": {"save_dir": "runs", "name": None},
}
"""A name of null is that of the first config."""
# A sanity step finds what cannot be evaluated before hours of training; it runs nothing else.
TRAINER_DEFAULTS: dict[str, Any] = {
    "check_val_every_n_epoch": None, "num_sanity_val_steps": 1, "log_every_n_steps": 50, "devices": 1,
    "logger": LOGGER,
}  # fmt: skip
CHECKPOINT_DEFAULTS: dict[str, Any] = {"every_n_train_steps": 1000, "save_last": True}
"""What ``unidad`` sets otherwise than Lightning does."""
MOST, MOST_BYTES = 100_000, 10_000_000  # the largest of configs/ has about 150 values


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


def read_config(path: str | Path) -> dict[str, Any]:
    """The content of a YAML file; nothing for an empty one.

    Raises:
        FileNotFoundError: there is none.
        BrokenFile: it is not YAML, no mapping from names to values, asks for Python objects by a tag, or grows beyond
            :data:`MOST` values when its aliases are written out, or a name stands twice in one of its mappings.
    """
    import yaml

    way_out = "write it as a YAML mapping, such as a run's config.yaml"
    with reading(path, "config", way_out):
        text = Path(path).read_bytes()[: MOST_BYTES + 1].decode()
        if len(text) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        _size(yaml.compose(text, Loader=yaml.SafeLoader), {})
        content = yaml.safe_load(text)
    if not isinstance(content or {}, dict) or not all(isinstance(name, str) for name in content or {}):
        raise BrokenFile(f"{str(path)!r} is no config (its content is {type(content).__name__}): {way_out}")
    return content or {}


def _size(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node holds, those behind aliases counted wherever they stand.

    Raises:
        ValueError: too many, or a name that stands twice in a mapping, of which YAML would keep the last alone.
    """
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST  # an alias of what holds it has no end
    inner = node.value if isinstance(getattr(node, "value", None), list) else []
    lines: dict[str, int] = {}
    for name in (pair[0] for pair in inner if isinstance(pair, tuple) and isinstance(pair[0].value, str)):
        line = name.start_mark.line + 1
        if name.value in lines:
            raise ValueError(f"{name.value!r} stands twice in one mapping, in lines {lines[name.value]} and {line}")
        lines[name.value] = line
    size = 1 + sum(_size(part, known) for pair in inner for part in (pair if isinstance(pair, tuple) else (pair,)))
    if size > MOST:
        raise ValueError(f"more than {MOST} values when its aliases are written out")
    known[id(node)] = size
    return size


def merge_configs(configs: list[Any]) -> Any:
    """Configs on top of each other: later values win, lists whole; mappings are merged, unless the class changes."""
    merged: Any = {}
    for config in configs:
        both = isinstance(merged, dict) and isinstance(config, dict)
        if both and config.get("class_path", merged.get("class_path")) == merged.get("class_path"):
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

"""What a run may change when it is resumed: nothing that shapes the method. Kept in the checkpoint as plain data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

KEY = "unidad_pl"
ABSENT = "<not there>"


class Resumable(pl.LightningModule):
    """Stores the options a module was made with, and refuses to go on training with others.

    Options in :attr:`free_options` may change, and so may the trainer's (devices, precision, steps): both are logged.
    Where a source's weights come from may change as well, what they are may not: frozen networks are compared by their
    content, trained ones come from the checkpoint.
    """

    free_options: tuple[str, ...] = ("accumulate", "max_skipped", "memory")
    """Arguments that do not shape what is computed."""

    _given: dict[str, Any]
    _skipped_in_a_row: dict[str, int]

    def __new__(cls, *args: Any, **kwargs: Any) -> Resumable:
        module = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(module, *args, **kwargs)
        bound.apply_defaults()
        module.__dict__["_given"] = dict(list(bound.arguments.items())[1:])
        return module

    def options(self) -> dict[str, Any]:
        """The arguments this module was made with, flat and plain: ``critic.loss`` -> ``bce``."""
        return dict(_flat(self._given))

    def trainer_options(self) -> dict[str, Any]:
        """What of the trainer a checkpoint remembers; these may change."""
        return {
            "devices": self.trainer.world_size,
            "precision": self.trainer.precision,
            "max_steps": self.trainer.max_steps,
        }

    def picture_size(self) -> list[int]:
        """[C, H, W] of the sampled network."""
        return list(self.sampled_network.image_shape)  # type: ignore[union-attr,arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY] = {
            "options": self.options(),
            "trainer": self.trainer_options(),
            "image_shape": self.picture_size(),
            "skipped_in_a_row": dict(self._skipped_in_a_row),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before a fit, compare; then load as ever.

        Raises:
            RuntimeError: the run would go on with another option or image size; names both values.
        """
        saved = checkpoint.get(KEY)
        if saved is not None and self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._compare(saved["options"])
            self.configure_model()
            if saved["image_shape"] != self.picture_size():
                raise RuntimeError(
                    f"the checkpoint was trained on images of {saved['image_shape']}, this run's are "
                    f"{self.picture_size()}: set the resolution the run started with"
                )
            for name, (before, now) in differences(saved["trainer"], self.trainer_options()).items():
                rank_zero_info(f"Resuming with {name} {now}; the checkpoint was written with {before}")
            self._skipped_in_a_row = dict(saved["skipped_in_a_row"])
        super().on_load_checkpoint(checkpoint)

    def _compare(self, saved: dict[str, Any]) -> None:
        refused = []
        for name, (before, now) in differences(saved, self.options()).items():
            if name.partition(".")[0] in self.free_options:
                rank_zero_info(f"Resuming with {name} {now!r}; the checkpoint was written with {before!r}")
            else:
                refused.append(f"{name} was {before!r} and is now {now!r}")
        if refused:
            raise RuntimeError(
                f"the checkpoint was trained with other options: {'; '.join(refused)}. Resume with the config the run "
                f"started with (config.yaml in its folder), or begin a new run without --ckpt_path"
            )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (value before, value now) where they differ; a name that only one side has is :data:`ABSENT` on the
    other."""
    names = sorted({*before, *now})
    pairs = {name: (before.get(name, ABSENT), now.get(name, ABSENT)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(value: Any, name: str = "", inside: bool = False) -> list[tuple[str, Any]]:
    """(dotted name, plain value) of everything in ``value``; an object appears as its class and its attributes."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, Mapping):
        parts = {str(key): item for key, item in value.items()}
    elif isinstance(value, (bool, int, float, str)) or value is None:
        return [(name, value)]
    elif isinstance(value, (list, tuple)):
        plain = [dict(_flat(item, "", inside)) for item in value]
        return [(name, [item.get("", item) for item in plain])]
    else:
        kind = [(name, f"{type(value).__module__}.{type(value).__qualname__}")]
        attributes = {} if inside else getattr(value, "__dict__", {})
        # A string in a source is a place, or the name of one: what is found there is what counts.
        public = {k: v for k, v in attributes.items() if not k.startswith("_") and not isinstance(v, str)}
        return kind + [pair for k, v in public.items() for pair in _flat(v, f"{name}.{k}", True)]
    return [pair for k, v in parts.items() for pair in _flat(v, f"{name}.{k}" if name else k, inside)]

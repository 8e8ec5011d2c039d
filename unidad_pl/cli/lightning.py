"""The LightningCLI behind ``unidad``; apart from ``main.py`` so that ``unidad --version`` needs no torch."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse.typing import PositiveInt
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

from unidad_pl.callbacks.environment import RunRecord
from unidad_pl.callbacks.prediction_writer import PredictionWriter
from unidad_pl.callbacks.preemption import Preemption, leaving_on_signals
from unidad_pl.callbacks.records import run_folder
from unidad_pl.callbacks.sound_checkpoint import SoundCheckpoint
from unidad_pl.checks import check_at_least
from unidad_pl.cli.description import DESCRIPTION
from unidad_pl.cli.launch import check_launcher
from unidad_pl.cli.parsing import ConfigFile, HelpFormatter, Parser, later_values_replace, read_nested_nulls
from unidad_pl.cli.progress import PhaseBar
from unidad_pl.cli.summary import NetworkTable, fit_summary, print_files
from unidad_pl.runs.checkpoints import DurableCheckpointIO, is_remote, refuse_damaged
from unidad_pl.runs.config import CHECKPOINT_DEFAULTS, LOGGER, TRAINER_DEFAULTS
from unidad_pl.runs.resume import WORDS, choose_folder, event_files, find_checkpoint, remove_unused
from unidad_pl.training.module import GenerativeModule
from unidad_pl.training.refusals import refuse_trainer

THREADS_PER_CORE = 4
HELP = {
    "ckpt_path": "a checkpoint to go on from, or whose weights are evaluated: a path; last: the newest intact one of "
    "the run whose config.yaml is given, else of all runs of this config; auto: the same, but begin where there is "
    "none",
    "checkpoint.dirpath": "where checkpoints are written; null: checkpoints/ in the run folder",
    "weights_only": "checkpoints are read as tensors and plain data; false, which would run code in them, is refused",
}
"""Option -> what it does here, where Lightning's own text says otherwise."""
IN_PLACE_OF: dict[type[pl.Callback], type[pl.Callback]] = {
    ModelSummary: NetworkTable, RichModelSummary: NetworkTable, RichProgressBar: PhaseBar, TQDMProgressBar: PhaseBar,
}  # fmt: skip
"""What Lightning adds by itself -> ours."""


class Validations(pl.Callback):
    """Remembers whether a fit began, and what its validations found: the last, so that it need not be done again at the
    end, and that before the first iteration, which a run that is resumed has in its checkpoint.

    >>> Validations().state_dict()
    {}
    """

    step: int | None = None
    metrics: dict[str, float]
    before: dict[str, float] | None = None
    began = False

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before} if self.before else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.began = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            logged: Any = trainer._results
            self.step = trainer.global_step
            self.metrics = {name: float(value) for name, value in logged.metrics(on_step=False)["log"].items()}


class UnidadCLI(LightningCLI):
    """LightningCLI with one seed for everything, a picture writer for ``predict``, and a summary after ``fit``."""

    def __init__(self, *options: Any, **named: Any) -> None:
        args = named["args"]
        first = args[0] if args and "UNIDAD_CONFIG" not in os.environ else None  # a config may name the subcommand
        self.wanted = {first} if first in self.subcommands() else set(self.subcommands())
        self.made: list[Path] = []
        self.written: set[Path] | None = None  # TensorBoard's files of the run that is resumed
        super().__init__(*options, **named)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Options of the wanted subcommand only: those of one are a thousand, and take their time."""
        if subcommand not in self.wanted:
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            action.help = HELP.get(action.dest, action.help)
        return parser

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose help explains all groups."""
        parser = Parser(**{"dump_header": [f"unidad_pl=={version('unidad_pl')}"], **kwargs})
        parser.add_argument("-c", "--config", action=ConfigFile, help="YAML file of options; later ones win")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--summary", type=bool, default=True,
            help="end fit with a table of the metrics of its weights; fit, validate and test say where the files lie",
        )  # fmt: skip
        parser.add_argument(
            "--evaluate_before", type=bool, default=False,
            help="validate before the first iteration too, for a column of the untrained weights in that table",
        )  # fmt: skip
        parser.add_argument(
            "--threads", type=PositiveInt | None, default=None,
            help="CPU threads of torch; null leaves them to torch. 1 suits small models, above all on a shared machine",
        )  # fmt: skip
        parser.add_argument(
            "--predictions_folder", type=str | None, default=None,
            help="where predict writes its PNGs, named by seed; null: predictions/ in the run folder",
        )  # fmt: skip
        parser.add_lightning_class_args(SoundCheckpoint, "checkpoint", required=False)
        parser.set_defaults({f"checkpoint.{name}": value for name, value in CHECKPOINT_DEFAULTS.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """``args`` are always given: Lightning would warn that there is a command line too."""
        self.config = parser.parse_args(args)
        self._refuse_unknown_variables(self.config["subcommand"])

    def _refuse_unknown_variables(self, subcommand: str) -> None:
        prefix = f"UNIDAD_{subcommand.upper()}__"
        options = self._parser(subcommand)._actions
        known = {prefix + action.dest.replace(".", "__").upper() for action in options}
        for name in os.environ:
            if name.startswith(prefix) and name not in known:
                raise ValueError(
                    f"the environment variable {name} is no option of unidad {subcommand}: unset it, or correct it "
                    f"({prefix}TRAINER__MAX_STEPS; the options of a class come together, as {prefix}MODEL="
                    f"'{{class_path: ..., init_args: {{...}}}}')"
                )

    def _dump_config(self) -> None:
        # Lightning dumps the whole config for the hyperparameters, and again for config.yaml: half a second each.
        if "text" not in self.save_config_kwargs:
            config = self.config[self.subcommand].clone()
            if config.ckpt_path == "last":  # another run of this config is to begin anew
                config.ckpt_path = None
            text = self._parser(self.subcommand).dump(config, skip_none=False)
            self.save_config_kwargs |= {"text": text}
            self.config_dump = yaml.safe_load(text)

    def before_instantiate_classes(self) -> None:
        """``seed_everything`` seeds the model and the data too, wherever they take a seed and were not given one; the
        run is called after its first config, and lies in ``trainer.default_root_dir`` where one is given."""
        config = self.config[self.subcommand]
        if config.threads is not None:
            check_at_least(1, THREADS_PER_CORE * (os.cpu_count() or 1), threads=config.threads)
            torch.set_num_threads(config.threads)
        seed = 0 if isinstance(config.seed_everything, bool) else int(config.seed_everything)
        for place in ("model.init_args.training", "data.init_args"):
            init = config.get(place)
            if init is not None and "seed" in init and init["seed"] is None:
                init["seed"] = seed
        trainer = config.trainer
        logger = trainer.logger
        if getattr(logger, "class_path", None) == LOGGER["class_path"]:
            if logger.init_args.name is None:
                logger.init_args.name = Path(str(config.config[0])).stem if config.config else "unidad"
            if trainer.default_root_dir is not None and logger.init_args.save_dir == LOGGER["init_args"]["save_dir"]:
                logger.init_args.save_dir = trainer.default_root_dir
        if trainer.val_check_interval is None and trainer.check_val_every_n_epoch is None:
            trainer.check_val_every_n_epoch = 1

    def _parse_ckpt_path(self) -> None:
        # Lightning would put the file's hyperparameters over the config, and import the class they name.
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path is not None and not is_remote(path) and Path(path).is_file():
            refuse_damaged(path)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """With checkpoints that survive, an end in good order on signals, and our own words about what goes on, unless
        the config brings its own."""
        init = self._get(self.config_init, "trainer")
        own = [*init.callbacks] if isinstance(init.callbacks, list) else [init.callbacks]
        if init.enable_checkpointing is False or any(isinstance(one, ModelCheckpoint) for one in own):
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        self._dump_config()  # done, unless model and data are plain objects
        trainer = super().instantiate_trainer(**kwargs)
        if str(init.precision) in ("16", "16-mixed") and trainer.precision == "bf16-mixed":  # Lightning only warns
            raise ValueError(f"trainer.precision: {init.precision} needs a GPU, on a CPU it is bf16-mixed or 32-true")
        check_launcher(trainer.world_size, os.environ)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        ours = {place: IN_PLACE_OF[type(one)]() for place, one in enumerate(callbacks)
                if type(one) in IN_PLACE_OF and one not in own}  # fmt: skip
        callbacks[:] = [ours.get(place, one) for place, one in enumerate(callbacks)]
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning's would save at its end
            callbacks[:] = [one for one in callbacks if not isinstance(one, ModelCheckpoint)]
        if not any(isinstance(callback, Preemption) for callback in callbacks):
            callbacks.append(Preemption())  # last: what it saves is what all others have made of the iteration
        self.validated = Validations()
        callbacks.append(self.validated)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if not self.validated.began:
                new = event_files(self.trainer) - self.written if self.written is not None else set()
                remove_unused([*self.made, *new])
            raise

    def before_fit(self) -> None:
        """The checkpoint to resume from, or the untrained weights' metrics if the summary is to have them.

        Raises:
            FileNotFoundError: ``--ckpt_path`` leads to no file; Lightning would train from the start after a warning.
        """
        if isinstance(self.model, GenerativeModule):
            refuse_trainer(self.trainer)  # before the first evaluation, which takes its time
        wanted = self._get(self.config, "ckpt_path")
        path = self._find_checkpoint()
        self.made = choose_folder(self.trainer, path if wanted in WORDS else None)
        if path is not None and self.trainer.is_global_zero:
            self.written = event_files(self.trainer)
        quick = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        before = path is None and not quick and self._get(self.config, "evaluate_before")
        self.validated.before = self._validate() if before else None

    def before_validate(self) -> None:
        """``--ckpt_path last`` is the newest intact checkpoint."""
        self._find_checkpoint()

    before_test = before_validate

    def _find_checkpoint(self) -> str | None:
        configs = [str(config) for config in self._get(self.config, "config") or ()]
        path = find_checkpoint(self.trainer, self._get(self.config, "ckpt_path"), configs)
        self.config_init[self.subcommand]["ckpt_path"] = path
        return path

    def after_fit(self) -> None:
        """Metrics of the trained weights, and the closing table.

        Raises:
            RuntimeError: the run folder was deleted while the run wrote there.
        """
        last = self.validated
        after = last.metrics if last.step == self.trainer.global_step else self._validate()
        if self._get(self.config, "summary"):
            folder = run_folder(self.trainer)  # a collective: on every rank
            if self.trainer.is_global_zero:
                fit_summary(self.trainer, folder, last.before, after)
        record = next((one for one in self.trainer.callbacks if isinstance(one, RunRecord)), None)  # type: ignore[attr-defined]
        if record is not None and record.deleted_at is not None:
            raise RuntimeError(
                f"the run folder was deleted at iteration {record.deleted_at}: checkpoints from then on are there, "
                f"what was written before is lost"
            )

    def after_test(self) -> None:
        """Say where the numbers and the pictures are."""
        if self._get(self.config, "summary"):
            folder = run_folder(self.trainer)  # a collective: on every rank
            if self.trainer.is_global_zero:
                print_files(self.trainer, folder)

    after_validate = after_test

    def before_predict(self) -> None:
        """Pictures of our own modules are written; other people's may return anything."""
        self._find_checkpoint()
        if isinstance(self.model, GenerativeModule) and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = self._get(self.config, "predictions_folder")
            trainer: Any = self.trainer
            trainer.callbacks.append(PredictionWriter(folder))

    def _validate(self) -> dict[str, float] | None:
        """Metrics of the current weights, or None where there is nothing to validate with."""
        owners = ((self.model, pl.LightningModule), (self.datamodule, pl.LightningDataModule))
        possible = is_overridden("validation_step", self.model) and any(
            owner is not None and is_overridden("val_dataloader", owner, parent) for owner, parent in owners
        )
        wanted = self._get(self.config, "summary") and self.trainer.limit_val_batches
        if not possible or not wanted or self.trainer.interrupted:
            return None
        results = self.trainer.validate(self.model, self.datamodule, verbose=False)
        return {name: float(value) for result in results for name, value in result.items()}


def _quieten() -> None:
    """Drop warnings about things that are meant to be so here."""
    # Our evaluation loaders yield ready batches of seeds and frozen networks are in eval mode by design.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*Your `IterableDataset` has `__len__` defined.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*no `saved_models`.*|.*pre-optimization state.*")
    # A run goes on in its own folder, and what evaluates one does not.
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*The dirpath has changed from.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


def run(args: Sequence[str] | None) -> UnidadCLI:
    """Parse ``args`` (the command line's if None) and run the subcommand they name."""
    _quieten()
    read_nested_nulls()
    with leaving_on_signals(), later_values_replace():
        return UnidadCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # the modules have several, each with its options
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            args=list(sys.argv[1:] if args is None else args),
            parser_kwargs={"prog": "unidad", "description": DESCRIPTION, "formatter_class": HelpFormatter,
                           "default_env": True, "env_prefix": "UNIDAD"},
            save_config_callback=RunRecord,
            save_config_kwargs={"overwrite": True},
        )  # fmt: skip

"""The base of all generative modules: micro-batches with seeded draws, an average of weights, evaluation, resuming.

* One ``training_step`` is one iteration, and ``trainer.global_step`` counts it once, however many optimisers step.
* A loss reaches only the parameters of the group it is for; frozen networks never get gradients.
* All random draws of an iteration come from ``f(seed, iteration, micro-batch)``, so nothing has to be saved to resume.
* Frozen networks are not in checkpoints: their content hash is, and another network is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from unidad_pl.arguments import describe, given_arguments, known_classes, rebuild
from unidad_pl.backbones.weights import read_plain
from unidad_pl.checks import check_choices
from unidad_pl.condition import Condition
from unidad_pl.data.batch import Batch, EncodedBatch, as_batch
from unidad_pl.denoiser import Codec, Denoiser, DenoiserSource
from unidad_pl.files import reading
from unidad_pl.sampling import FewStepSampler, as_seeds
from unidad_pl.seeds import mix_seed
from unidad_pl.strategies.agreement import check_agreement
from unidad_pl.training.conditions import ClassLabels, check_batch, check_prompts, check_shots, encode_prior
from unidad_pl.training.hparams import TrainingOptions, complete, defaults, flatten, log_changes, refuse_changes
from unidad_pl.training.many_steps import in_many_steps
from unidad_pl.training.networks import MemoryOptions, Networks, averaged
from unidad_pl.training.stepping import ManualOptimization

if TYPE_CHECKING:
    from typing_extensions import Self

RECORD = "unidad_pl"
"""Entry of a checkpoint with what is not weights: options, iteration, image size."""


class GenerativeModule(ManualOptimization, Networks):
    """Base of :class:`~unidad_pl.modules.unidad.UniDAD` and :class:`~unidad_pl.modules.diffusion.Diffusion`.

        >>> from unidad_pl import Diffusion, NewUNet  # the shortest subclass, to start from
        >>> isinstance(Diffusion(NewUNet()), GenerativeModule)
        True

    A subclass builds its networks in :meth:`build_networks`, names its trained parameters in :meth:`groups`, and
    computes its losses in ``training_step``.

    Args:
        sampled_name: the attribute, and the prefix in checkpoints, of the network that is sampled and averaged.
        clock: the group that is updated in every iteration.
        training, memory: see :class:`~unidad_pl.UniDAD`.
        frozen_networks: attributes that hold frozen networks.

    Raises:
        ValueError: a place for an average that is not kept.
    """

    free_options: tuple[str, ...] = ("training.accumulate", "training.max_skipped", "memory")
    """Options, or groups of them, that do not shape what is computed: a resumed run may change them."""

    _given: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> GenerativeModule:
        module = super().__new__(cls)
        module.__dict__["_given"] = given_arguments(cls.__init__, args, kwargs)
        return module

    def __init__(
        self,
        sampled_name: str,
        clock: str,
        training: TrainingOptions,
        memory: MemoryOptions,
        frozen_networks: Sequence[str] = (),
    ) -> None:
        super().__init__(clock, training.accumulate, training.max_skipped,
                         memory=memory, frozen_networks=frozen_networks)  # fmt: skip
        if memory.ema_device is not None and not training.ema_decay:
            raise ValueError(
                f"memory.ema_device {memory.ema_device!r} does nothing without an average: leave it null, or set "
                f"training.ema_decay above 0"
            )
        self.sampled_name, self.seed = sampled_name, training.seed or 0
        self.ema_decay, self.classes = training.ema_decay, training.classes
        self._built = False

    # -- to be implemented by subclasses -------------------------------------------------------------------------

    def build_networks(self) -> None:
        """Make all networks, by :meth:`build`; called once per process, with torch's random state seeded."""
        raise NotImplementedError

    @property
    def sampled_source(self) -> DenoiserSource:
        """What the sampled network started from: it has its architecture."""
        raise NotImplementedError

    def generate(self, network: Denoiser, seeds: Tensor, cond: Condition | None) -> Tensor:
        """Images [B, C, H, W] for ``seeds`` [B]; row i depends on seed and condition i only."""
        raise NotImplementedError

    def few_step(self) -> tuple[FewStepSampler, float]:
        """The trained few-step sampler, and the smallest sigma for other numbers of steps.

        Raises:
            ValueError: the module is sampled in many steps.
        """
        raise NotImplementedError

    def updates_of(self, group: str, iterations: int) -> int:
        """How often ``group`` is updated in ``iterations`` iterations."""
        return iterations

    def costliest_iteration(self) -> int:
        """An iteration that needs as much memory as any other."""
        return 0

    def takes_prior(self) -> bool:
        """Whether anything learns from the ``prior`` of a batch: pictures of the subject's class."""
        return False

    # -- networks and optimisers ---------------------------------------------------------------------------------

    @property
    def sampled_network(self) -> Denoiser:
        """The network that :meth:`sample` uses and that the average follows."""
        return getattr(self, self.sampled_name)

    def build(self, source: DenoiserSource) -> Denoiser:
        """A network of ``source``."""
        return source.build()

    def configure_model(self) -> None:
        if not self._built:
            self._build_all()
        self.shard_networks()

    def _build_all(self) -> None:
        self.codec: Codec = self.sampled_source.codec()  # first: it knows what a model needs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, 0xA11))
            self.build_networks()
        self.labels = ClassLabels(self.sampled_network.num_classes, self.classes)
        check_shots(getattr(self._trainer, "datamodule", None), self.codec, self.sampled_network)
        if self.memory.checkpointing in ("blocks", "both"):
            for name, network in self.named_children():
                if isinstance(network, Denoiser) and name not in self.frozen_networks:
                    network.checkpoint_blocks()
        if self.ema_decay:
            self.ema = averaged(self.sampled_network, self.ema_decay)
        if isinstance(self.codec, nn.Module):  # it is nobody's to train, and in no checkpoint
            self.frozen_networks += ("codec",)
        self.freeze_networks()
        self._built = True
        self.train()

    def configure_optimizers(self) -> Any:
        # max_steps is -1 when the run is bounded by time or epochs: rates then stay at their peak after the warm-up.
        iterations = self.trainer.max_steps if self.trainer.max_steps > 0 else 2**62
        settings = self.optimizers_of_groups()
        idle = [name for name in settings if self.updates_of(name, iterations) == 0]
        if idle:
            why = f": T alone takes {alone} (adaptation.pretrain)" if (alone := getattr(self, "pretrain", 0)) else ""
            rank_zero_warn(f"{' and '.join(idle)}: not trained in the {iterations} iterations of max_steps{why}")
        built = [one.build(self.groups()[name], self.updates_of(name, iterations)) for name, one in settings.items()]
        return [optimizer for optimizer, _ in built], [schedule for _, schedule in built]

    # -- one iteration -------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        check_prompts(self.codec, data)
        check_agreement(flatten({"data": data and data.state_dict(), "model": self._given}))

    def micro_batches(self, batch: Any) -> Iterator[EncodedBatch]:
        """Split a batch into ``accumulate`` parts and encode them, each with torch seeded by (seed, iteration, part).

        A class-conditional model whose batches carry no labels gets random ones.

        Raises:
            ValueError: the images are not of the model's size, labels do not fit the model, or the batch cannot be
                split evenly.
        """
        batch = as_batch(batch)
        self.labels.check(batch.labels, len(batch.images))
        check_batch(batch, self.codec, self.sampled_network, self.accumulate, self.takes_prior(), self.iteration)
        size = len(batch.images) // self.accumulate
        for part in range(self.accumulate):
            torch.manual_seed(mix_seed(self.seed, self.iteration, self.global_rank * self.accumulate + part))
            encoded = self._encoded(batch, slice(part * size, (part + 1) * size))
            encoded.last = part == self.accumulate - 1
            yield encoded

    def _encoded(self, batch: Batch, rows: slice) -> EncodedBatch:
        images = batch.images[rows]
        if batch.prompts is None:
            labels = self.labels.draw(len(images), images.device) if batch.labels is None else batch.labels[rows]
            return EncodedBatch(self.codec.encode(images), Condition.of(labels))
        cond, source = self.embed(batch.prompts[rows]), batch.source_prompts
        source_cond = None if source is None else self.embed(source[rows])
        return EncodedBatch(self.codec.encode(images), cond, source_cond, encode_prior(batch.prior, rows, self.codec))

    def embed(self, prompts: Sequence[str]) -> Condition:
        """Condition of ``prompts``, on the module's device."""
        return self.codec.embed(prompts, self.device)

    def shared_randint(self, high: int) -> int:
        """A draw in [0, high) that is the same on every rank and for every micro-batch of this iteration."""
        return mix_seed(self.seed, self.iteration, 0x5EED) % high

    def finish_iteration(self, sampled_network_updated: bool) -> None:
        """Advance the iteration count; update the average if the sampled network changed."""
        if sampled_network_updated and self.ema is not None:
            self.ema.update_parameters(self.sampled_network)
        self.close_iteration()
        self.iteration += 1
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.iteration % max(1, every) == 0:
            self.refuse_diverged()

    def on_train_end(self) -> None:
        self.refuse_diverged()

    # -- evaluation: seeds in, images out ------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        seeds: Tensor | Sequence[int],
        labels: Tensor | None = None,
        weights: Literal["auto", "ema", "raw"] = "auto",
        prompts: Sequence[str] | None = None,
    ) -> Tensor:
        """Generate one image per seed. Image ``s`` is the same for any batch it is drawn in.

        Args:
            seeds: B integers.
            labels: B class labels; None: a class-conditional model's classes in turn, seed 0 the first.
            weights: ``ema``, ``raw`` or ``auto`` (ema where it exists).
            prompts: B prompts, for a text-to-image model.

        Returns:
            Pictures [B, C, H, W], clamped to [-1, 1].

        Raises:
            ValueError: ``weights="ema"`` without an average, or labels that do not fit the model.
        """
        check_choices(weights=(weights, Literal["auto", "ema", "raw"]))
        self.configure_model()
        if weights == "ema" and self.ema is None:
            raise ValueError("weights='ema' but this module keeps no average: set ema_decay above 0")
        seeds = as_seeds(seeds)
        self.labels.check(labels, len(seeds))
        labels = self.labels.of_seeds(seeds) if labels is None else labels
        cond = Condition.of(None if labels is None else labels.to(self.device))
        cond = cond if prompts is None else self.embed(prompts)
        network: Any = self.ema.module if self.ema is not None and weights != "raw" else self.sampled_network
        if next(network.parameters()).device != self.device:  # an average kept elsewhere
            network = copy.deepcopy(network).to(self.device)
        training = network.training
        network.eval()
        images = self.codec.decode(self.generate(network, seeds, cond)).clamp(-1, 1)
        network.train(training)
        return images

    def sample_network(self, name: str, seeds: Any, num_steps: int = 8) -> Tensor:
        """Pictures [B, C, H, W] of one of :meth:`denoisers`, a teacher or another: see :func:`in_many_steps`."""
        return in_many_steps(self, name, torch.as_tensor(seeds, dtype=torch.long), num_steps)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Draw the seeds of ``batch``: what every evaluation callback works on."""
        seeds, labels, prompts = batch["seeds"], batch.get("labels"), batch.get("prompts")
        labels = self.labels.of_seeds(seeds) if labels is None else labels
        images = self.sample(seeds, labels, prompts=prompts)
        outputs = {"samples": images, "seeds": seeds, "weights": "raw" if self.ema is None else "ema"}
        outputs |= {} if prompts is None else {"prompts": prompts}
        return outputs if labels is None else outputs | {"labels": labels}

    test_step = predict_step = validation_step
    forward = sample

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.refuse_diverged()
        for key in self.unsaved_weights():
            del checkpoint["state_dict"][key]
        checkpoint["frozen_sha256"] = self.frozen_hashes()
        checkpoint[RECORD] = {
            "iteration": self.iteration,
            "options": dict(flatten(self._given)),
            "module": describe(self),
            "trainer": self.trainer_options(),
            "image_shape": list(self.sampled_network.image_shape),
            "skipped_in_a_row": dict(self._skipped_in_a_row),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load for evaluation, or to go on training; a fit goes on only as it began.

        Raises:
            RuntimeError: the run would go on with another option, image size or frozen network; names both values.
        """
        record = checkpoint[RECORD]
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting:
            refuse_changes(
                record["options"], dict(flatten(self._given)), self.free_options,
                standard=defaults(self._given, type(self).__init__),
            )  # fmt: skip
        self.configure_model()
        if fitting:
            if record["image_shape"] != (own := list(self.sampled_network.image_shape)):
                raise RuntimeError(
                    f"the checkpoint was trained on images of {record['image_shape']}, this run's are {own}: set the "
                    f"resolution the run started with"
                )
            log_changes(record["trainer"], self.trainer_options())
            self._skipped_in_a_row = dict(record["skipped_in_a_row"])
        self.check_hashes(checkpoint["frozen_sha256"])
        self.iteration = record["iteration"]

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", strict: bool = True, **arguments: Any
    ) -> Self:
        """The module that wrote a checkpoint, with its weights: ``UniDAD.load_from_checkpoint(PATH)``.

        Args:
            checkpoint_path: the file; code in it never runs.
            map_location, strict: see ``torch.load`` and ``load_state_dict``.
            arguments: of the constructor, instead of those the checkpoint was written with.

        Raises:
            FileNotFoundError: no such file, or the source model is not there.
            ValueError: the file is no checkpoint of this class's, or cannot hold one of the arguments; names it.
        """
        content = read_plain(checkpoint_path, str(checkpoint_path), map_location)
        with reading(checkpoint_path, f"checkpoint of a {cls.__name__}", "give the file that its run wrote"):
            given = rebuild(content[RECORD]["module"]["init_args"], known_classes(DenoiserSource, GenerativeModule))
        module = cls(**complete(cls, given | arguments))
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"], strict)
        return module

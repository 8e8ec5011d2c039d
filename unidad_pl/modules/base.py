"""What every generative module here shares: optimiser groups stepped by hand, EMA, seeded draws, partial checkpoints.

The rules it keeps (DESIGN):

* one ``training_step`` is one iteration, and ``trainer.global_step`` counts it once, however many optimisers step;
* a loss reaches only the parameters of the group it is for; frozen networks never get gradients;
* all random draws of an iteration come from ``f(seed, iteration, micro-batch)``, so nothing has to be saved to resume;
* frozen networks are not in checkpoints: their content hash is, and another network is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from unidad_pl.data.batch import Batch, EncodedBatch
from unidad_pl.denoiser import Codec, Denoiser, DenoiserSource
from unidad_pl.distributed import UnwrappedDDPStrategy
from unidad_pl.modules.frozen import Memory
from unidad_pl.modules.labels import ClassLabels
from unidad_pl.modules.optimization import check_choices
from unidad_pl.modules.prompts import check_prompts, encode_prior
from unidad_pl.modules.resume import Resumable
from unidad_pl.modules.sliced import SlicedNetworks
from unidad_pl.modules.stepping import ManualSteps
from unidad_pl.sampling import FewStepSampler
from unidad_pl.seeds import mix_seed
from unidad_pl.sharding import ShardedStrategy

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
STRATEGIES = (SingleDeviceStrategy, UnwrappedDDPStrategy, ShardedStrategy)


class GenerativeModule(ManualSteps, Resumable, SlicedNetworks):
    """Base of :class:`~unidad_pl.modules.unidad.UniDAD` and :class:`~unidad_pl.modules.diffusion.Diffusion`.

    A subclass builds its networks in :meth:`build_networks`, names its trained parameters in :meth:`groups`, its
    frozen networks in :attr:`frozen_networks`, and computes its losses in ``training_step``.

    Args:
        seed: seed of every random draw in training and of the initialisation of new layers; null: 0, or the command
            line's ``seed_everything``.
        accumulate: micro-batches an iteration's batch is split into; gradients are averaged over them.
        ema_decay: decay of the exponential moving average of the sampled network, one update per step of it; early
            on the decay is ``(1 + n) / (10 + n)``. 0: no average.
        max_skipped: iterations in a row with a non-finite loss or gradient after which the run ends with an error.
        classes: class labels to use of a class-conditional model; null: all of them.
        memory: what trades time for memory.
    """

    sampled_name: str
    """The attribute, and the prefix in checkpoints, of the network that is sampled."""

    def __init__(
        self,
        seed: int | None = None,
        accumulate: int = 1,
        ema_decay: float = 0.0,
        max_skipped: int = 10,
        classes: list[int] | None = None,
        memory: Memory = Memory(),  # noqa: B008 (a value, never mutated)
    ) -> None:
        self.memory = memory
        super().__init__()
        if accumulate < 1 or max_skipped < 1 or not 0 <= ema_decay < 1:
            raise ValueError(
                f"accumulate and max_skipped must be >= 1 and ema_decay in [0, 1), "
                f"got {accumulate}, {max_skipped} and {ema_decay}"
            )
        self.automatic_optimization = False
        self.seed = 0 if seed is None else seed
        self.accumulate, self.ema_decay, self.max_skipped = accumulate, ema_decay, max_skipped
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))
        self.iteration: Tensor
        self.ema: AveragedModel | None = None
        self.classes = classes
        self._skipped_in_a_row: dict[str, int] = {}
        self._hashes: dict[str, str] = {}
        self._built = False

    # -- to be implemented by subclasses -------------------------------------------------------------------------

    def build_networks(self) -> None:
        """Make all networks; called once per process, with torch's random state seeded by ``seed``."""
        raise NotImplementedError

    @property
    def sampled_network(self) -> Denoiser:
        """The network that :meth:`sample` uses and that the average follows."""
        network: Denoiser = getattr(self, self.sampled_name)
        return network

    @property
    def sampled_source(self) -> DenoiserSource:
        """What the sampled network started from: it has its architecture."""
        raise NotImplementedError

    def few_step(self) -> tuple[FewStepSampler, float]:
        """The trained few-step sampler, and the smallest sigma for other numbers of steps.

        Raises:
            ValueError: the module is sampled in many steps.
        """
        raise NotImplementedError

    def steps_of(self, group: str, iterations: int) -> int:
        """How often ``group`` steps in ``iterations`` iterations."""
        return iterations

    def generate(self, network: Denoiser, seeds: Tensor, cond: Tensor | None) -> Tensor:
        """Images [B, C, H, W] for ``seeds`` [B]; row i depends on ``seeds[i]`` and ``cond[i]`` only."""
        raise NotImplementedError

    # -- networks and optimisers ---------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if not self._built:
            self._build()
        self.slice_networks()

    def _build(self) -> None:
        self.codec: Codec = self.sampled_source.codec()  # first: it knows what a model needs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, 0xA11))
            self.build_networks()
        self.labels = ClassLabels(self.sampled_network.num_classes, self.classes)
        if self.memory.checkpointing in ("blocks", "both"):
            for name, network in self.named_children():
                if isinstance(network, Denoiser) and name not in self.frozen_networks:
                    network.checkpoint_blocks()
        if self.ema_decay:
            self.ema = AveragedModel(self.sampled_network, avg_fn=self._average).requires_grad_(False)
        self.freeze_networks()
        self._built = True
        self.train()

    def _average(self, mean: Tensor, value: Tensor, count: Tensor | int) -> Tensor:
        n = float(count)
        return mean.lerp(value, 1 - min(self.ema_decay, (1 + n) / (10 + n)))

    def configure_optimizers(self) -> Any:
        # max_steps is -1 when the run is bounded by time or epochs: rates then stay at their peak after the warm-up.
        iterations = self.trainer.max_steps if self.trainer.max_steps > 0 else 2**62
        idle = [name for name in self.optimizations() if self.steps_of(name, iterations) == 0]
        if idle:
            rank_zero_warn(f"{' and '.join(idle)}: not trained in the {iterations} iterations of max_steps")
        built = [
            setting.build(self.groups()[name], self.steps_of(name, iterations))
            for name, setting in self.optimizations().items()
        ]
        return [optimizer for optimizer, _ in built], [schedule for _, schedule in built]

    # -- one iteration -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what would run wrongly without an error, before anything has begun.

        Raises:
            RuntimeError: another strategy than ``unidad_ddp`` or ``unidad_fsdp`` on several processes
                (DistributedDataParallel expects every parameter in every backward pass), or a precision that the sigma
                range does not survive.
        """
        if stage == "fit" and not isinstance(self.trainer.strategy, STRATEGIES):
            name = type(self.trainer.strategy).__name__
            raise RuntimeError(
                f"strategy {name} cannot step several optimisers that each own their gradients. Use "
                f"--trainer.strategy unidad_ddp: processes as in ddp, gradients averaged once per optimiser step; or "
                f"unidad_fsdp, which also slices the networks over the ranks."
            )
        if self.trainer.precision not in PRECISIONS:
            raise RuntimeError(
                f"precision {self.trainer.precision!r} is not supported: use one of {', '.join(PRECISIONS)}"
            )

    def on_fit_start(self) -> None:
        check_prompts(self.codec, getattr(self.trainer, "datamodule", None))

    def micro_batches(self, batch: Batch) -> Iterator[EncodedBatch]:
        """Split a batch into ``accumulate`` parts and encode them, each with torch seeded by (seed, iteration, part).

        A class-conditional model whose batches carry no labels gets random ones.

        Raises:
            ValueError: the images are not of the model's size, labels do not fit the model, or the batch cannot be
                split evenly.
        """
        images, cond = batch.images, batch.cond
        self.labels.check(cond, len(images))
        if type(self.codec) is Codec and tuple(images.shape[1:]) != tuple(self.sampled_network.image_shape):
            raise ValueError(
                f"the data module serves images of {tuple(images.shape[1:])}, but the model works on "
                f"{tuple(self.sampled_network.image_shape)}: set the data module's resolution to the model's"
            )
        if len(images) % self.accumulate:
            raise ValueError(f"a batch of {len(images)} images cannot be split into accumulate={self.accumulate} parts")
        size = len(images) // self.accumulate
        for part in range(self.accumulate):
            number = self.global_rank * self.accumulate + part
            torch.manual_seed(mix_seed(self.seed, int(self.iteration), number))
            rows = slice(part * size, (part + 1) * size)
            if batch.prompts is not None:
                told, source = self._embed(batch.prompts[rows]), batch.source_prompts
                source_cond = None if source is None else self._embed(source[rows])
                latents = self.codec.encode(images[rows])
                prior = encode_prior(batch.prior, rows, self.codec, getattr(self, "trains_target", False))
                yield EncodedBatch(latents, told, source_cond, prior)
            else:
                labels = self.labels.draw(size, images.device) if cond is None else cond[rows]
                yield EncodedBatch(self.codec.encode(images[rows]), labels)

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        return self.codec.embed(prompts, self.device)

    def shared_randint(self, high: int) -> int:
        """A draw in [0, high) that is the same on every rank and for every micro-batch of this iteration."""
        return mix_seed(self.seed, int(self.iteration), 0x5EED) % high

    def finish_iteration(self, sampled_network_stepped: bool) -> None:
        """Advance the iteration count; update the average if the sampled network changed."""
        if sampled_network_stepped and self.ema is not None:
            self.ema.update_parameters(self.sampled_network)
        self.update_scale()
        self.iteration += 1

    # -- evaluation: seeds in, images out ------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        seeds: Tensor | Sequence[int],
        cond: Tensor | None = None,
        weights: str = "auto",
        prompts: Sequence[str] | None = None,
    ) -> Tensor:
        """Generate one image per seed. Image ``s`` is the same for any batch it is drawn in.

        Args:
            seeds: B integers.
            cond: B class labels; None: a class-conditional model's classes in turn, seed 0 the first.
            weights: ``ema``, ``raw`` or ``auto`` (ema where it exists).
            prompts: B prompts, for a text-to-image model.

        Returns:
            Pictures [B, C, H, W], clamped to [-1, 1].

        Raises:
            ValueError: ``weights="ema"`` without an average, or labels that do not fit the model.
        """
        check_choices(weights=(weights, ("auto", "ema", "raw")))
        self.configure_model()
        if weights == "ema" and self.ema is None:
            raise ValueError("weights='ema' but this module keeps no average: set ema_decay above 0")
        seeds = torch.as_tensor(seeds, dtype=torch.long)
        if prompts is not None:
            cond = self._embed(prompts)
        else:
            self.labels.check(cond, len(seeds))
            cond = self.labels.of_seeds(seeds) if cond is None else cond
        cond = None if cond is None else cond.to(self.device)
        network: Any = self.ema.module if self.ema is not None and weights != "raw" else self.sampled_network
        if next(network.parameters()).device != self.device:  # an average kept elsewhere
            network = copy.deepcopy(network).to(self.device)
        training = network.training
        network.eval()
        images = self.codec.decode(self.generate(network, seeds, cond)).clamp(-1, 1)
        network.train(training)
        return images

    def _evaluation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        seeds, cond, prompts = batch["seeds"], batch.get("cond"), batch.get("prompts")
        cond = self.labels.of_seeds(seeds) if cond is None else cond
        images = self.sample(seeds, cond, prompts=prompts)
        outputs = {"samples": images, "seeds": seeds, "weights": "raw" if self.ema is None else "ema"}
        outputs |= {} if prompts is None else {"prompts": prompts}
        return outputs if cond is None else outputs | {"labels": cond}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self._evaluation_step(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self._evaluation_step(batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self._evaluation_step(batch)

"""What a training cost: FLOPs and network evaluations of the iterations that really ran."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_leaves

from unidad_pl.callbacks.records import on_rank_zero, run_folder
from unidad_pl.checks import check_at_least, check_given
from unidad_pl.files import replacing
from unidad_pl.flops import TERA, Counting, Tally

FILE = "cost.json"


class Cost(pl.Callback):
    """Counts FLOPs and network evaluations of training, logs them, and writes ``cost.json`` into the run folder.

        >>> trainer = pl.Trainer(callbacks=[Cost()])  # logs cost/tflops, an axis for every other value

    Iterations of one kind cost the same: ours say by ``iteration_kind()`` of which kind the next one is, and the first
    of each kind is counted. A module without that method is counted in every iteration, which takes its time.
    Validation, sampling and what :class:`~unidad_pl.callbacks.balance.LossBalance` asks for are not in the numbers. All
    ranks are; a resumed run goes on counting.

    Args:
        before: TFLOPs of earlier stages: of a source that was adapted first, a student that was distilled first.

    Attributes:
        total: of all iterations so far and all ranks, without ``before``.
    """

    def __init__(self, before: float = 0.0) -> None:
        check_given(before=before)
        check_at_least(0, before=before)
        self.before, self.total = before, Tally()
        self._of_kind: dict[Hashable, Tally] = {}
        self._counting: Counting | None = None
        self._begun = False

    @property
    def tflops(self) -> float:
        """TFLOPs of all stages."""
        return self.before + self.total.flops / TERA

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._begun = True
        kind = getattr(pl_module, "iteration_kind", None)
        sizes = [value.shape for value in tree_leaves(getattr(batch, "images", batch)) if isinstance(value, Tensor)]
        self._kind = None if kind is None else (kind(), *sizes)
        if self._kind is None or self._kind not in self._of_kind:
            self._counting = Counting(dict(pl_module.named_children()))
            self._counting.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._begun:  # a loader gave None, which Lightning passes over
            return
        tally = self._stop() or self._of_kind.get(self._kind)
        assert tally is not None
        self._of_kind[self._kind] = tally
        for _ in range(trainer.world_size):
            self.total = self.total + tally
        pl_module.log("cost/tflops", self.tflops, rank_zero_only=True)

    def _stop(self) -> Tally | None:
        """What was counted since an iteration began; None where nothing was."""
        counting, self._counting, self._begun = self._counting, None, False
        return None if counting is None else counting.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()  # of an iteration that the module's on_train_batch_start has skipped, with the rest of the epoch

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = run_folder(trainer) / FILE
        on_rank_zero(trainer, path, lambda: self.write(path))

    def write(self, path: Path) -> None:
        """TFLOPs of all stages and of this one, and evaluations by network, as JSON."""
        content = {"tflops": self.tflops, "before": self.before, "evaluations": self.total.evaluations,
                   "encoder_only": self.total.encoders}  # fmt: skip
        with replacing(path) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        return {"flops": self.total.flops, "evaluations": dict(self.total.evaluations),
                "encoders": dict(self.total.encoders)}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        counters = (Counter(state_dict[name]) for name in ("evaluations", "encoders"))
        self.total = Tally(state_dict["flops"], *counters)

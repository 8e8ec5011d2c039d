"""Training of the cartoon world's feature network: name every factor that can be seen, under mild damage."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from unidad_pl.cartoons.features import INPUT_SIZE, FactorNetwork, FactorOutput
from unidad_pl.cartoons.world import CATEGORIES, DOMAINS, FLAT, RANGES, render, visible
from unidad_pl.checks import check_at_least, check_given, check_positive, check_whole
from unidad_pl.data.cartoon_labels import LabelledBatch
from unidad_pl.seeds import MOST_SEED, mix_seed
from unidad_pl.training.optimization import OptimizerOptions

CURVE_FILE = "curve.csv"
STANDARD = range(4_000_000, 4_001_000)  # the renders of each domain that the pooled features are standardised over


class FactorTraining(pl.LightningModule):
    """Supervised training of a :class:`~unidad_pl.cartoons.features.FactorNetwork` on labelled cartoons.

    Half of the images get Gaussian noise, half are blurred, all get a change of contrast and brightness. The amounts
    of noise and blur are factors too, ``noise`` and ``blur``: the network has to read them, so that its features are
    robust in what an image shows and still tell a damaged image from a clean one.

    At the end of ``fit`` the network is written to ``export_to`` as float16, with ``curve.csv`` (step, training loss
    since the last validation, validation accuracy) beside it.

    Args:
        optimizer: the optimiser; ``clip`` is the largest gradient norm.
        channels: see :class:`~unidad_pl.cartoons.features.FactorNetwork`.
        features: see there.
        value_weight: weight of the continuous factors (sum of smooth L1 errors, ranges mapped to [-1, 1]) against the
            categorical ones (sum of cross-entropies).
        noise: largest standard deviation of the noise, in units of the [-1, 1] image.
        blur: largest standard deviation of the blur, in pixels.
        jitter: largest change of contrast (relative) and brightness (absolute).
        export_to: folder of the result; null: ``cartoon_features`` in the trainer's ``default_root_dir``.
        seed: of the initial weights and the damage.

    Raises:
        ValueError: an amount of damage or a weight that is not positive (``jitter`` may be 0) or not finite, or a
            size or seed that is no whole number; names it.
    """

    def __init__(
        self,
        optimizer: OptimizerOptions = OptimizerOptions(lr=2e-3),  # noqa: B008 (a value, never mutated)
        channels: tuple[int, ...] = (16, 40, 80, 120),
        features: int = 96,
        value_weight: float = 4.0,
        noise: float = 0.15,
        blur: float = 0.7,
        jitter: float = 0.05,
        export_to: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_given(value_weight=value_weight, noise=noise, blur=blur, jitter=jitter, channels=channels)
        check_positive(value_weight=value_weight)
        check_positive(100, noise=noise, blur=blur)
        check_at_least(0, 100, jitter=jitter)
        check_whole(1, 65536, features=features)
        for width in channels:
            check_whole(1, 65536, channels=width)
        check_whole(0, MOST_SEED, seed=seed)
        self.optimizer_options, self.channels, self.features = optimizer, tuple(channels), features
        self.value_weight, self.noise, self.blur, self.jitter = value_weight, noise, blur, jitter
        self.export_to, self.seed = export_to, seed
        self.curve: list[tuple[int, float, float]] = []
        self._losses: list[Tensor] = []

    def configure_model(self) -> None:
        if hasattr(self, "network"):
            return
        ranges = RANGES | {"noise": (0.0, self.noise), "blur": (0.0, self.blur)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, 0xFAC))
            self.network = FactorNetwork(CATEGORIES, ranges, self.channels, self.features)

    def configure_optimizers(self) -> Any:
        updates = self.trainer.max_steps if self.trainer.max_steps > 0 else 2**62
        optimizer, schedule = self.optimizer_options.build(self.network.parameters(), updates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        if self.optimizer_options.clip:
            self.clip_gradients(optimizer, gradient_clip_val=self.optimizer_options.clip)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(mix_seed(self.seed, self.global_step, self.global_rank))
        images, damage = self.damaged(batch.images, generator)
        loss = self.loss(self.network(images), batch.labels | damage)
        self.log("loss/factors", loss, prog_bar=True)
        self._losses.append(loss.detach())
        return loss

    def damaged(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [B, 3, H, W] with contrast, blur and noise changed, and the amounts ``noise`` and ``blur`` [B]."""

        def amount(largest: float, share: float) -> Tensor:
            draws = torch.rand(2, len(images), generator=generator, device=images.device)
            return largest * draws[0] * (draws[1] < share)

        contrast, brightness = amount(2, 1) - 1, amount(2, 1) - 1
        images = images * (1 + self.jitter * contrast).view(-1, 1, 1, 1) + self.jitter * brightness.view(-1, 1, 1, 1)
        blur, noise = amount(self.blur, 0.5), amount(self.noise, 0.5)
        grain = torch.randn(images.shape, generator=generator, device=images.device)
        images = gaussian_blur(images, blur) + noise.view(-1, 1, 1, 1) * grain
        return images.clamp(-1, 1), {"noise": noise, "blur": blur}

    def loss(self, seen: FactorOutput, labels: dict[str, Tensor]) -> Tensor:
        """Sum over factors of the mean error over the images that show the factor; a scalar."""
        total = seen.features.new_zeros(())
        shown = visible(labels)
        for name, logits in seen.logits.items():
            total = total + _mean_where(F.cross_entropy(logits, labels[name], reduction="none"), shown[name])
        for name, value in seen.values.items():
            target = self.network.normalise(name, labels[name])
            errors = F.smooth_l1_loss(value, target, reduction="none", beta=0.1)
            # noise and blur are in every image
            total = total + self.value_weight * _mean_where(errors, shown.get(name, torch.ones_like(errors)))
        return total

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Log accuracy and mean absolute error (in the factor's units) of every factor the batch's domain shows."""
        domain = DOMAINS[int(batch.domain[0])]
        seen, shown, accuracies = self.network(batch.images), visible(batch.labels), []
        clean = torch.zeros_like(batch.labels["shade"])
        for name, logits in seen.logits.items():
            right = (logits.argmax(1) == batch.labels[name])[shown[name]].float()
            if len(right):
                accuracies.append(right.mean())
                self._log_mean(f"val/accuracy/{domain}/{name}", right)
        for name, value in seen.values.items():
            error = (self.network.denormalise(name, value) - batch.labels.get(name, clean)).abs()
            error = error[shown[name]] if name in shown else error
            if len(error):
                self._log_mean(f"val/error/{domain}/{name}", error)
        accuracy = torch.stack(accuracies).mean()
        self.log("val/accuracy", accuracy, batch_size=len(batch.images), sync_dist=True, prog_bar=True)

    def _log_mean(self, name: str, values: Tensor) -> None:
        self.log(name, values.mean(), batch_size=len(values), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if not self._losses:  # validation alone, or the check before training
            return
        accuracy = float(self.trainer.callback_metrics["val/accuracy"])
        self.curve.append((self.global_step, float(torch.stack(self._losses).mean()), accuracy))
        self._losses = []

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            self.export(self.export_to or Path(self.trainer.default_root_dir) / "cartoon_features")

    def export(self, folder: str | Path) -> None:
        """Write the network (float16) and the curve into ``folder``; standardise its pooled features before."""
        self.network.standardise(torch.cat([render(STANDARD, domain, INPUT_SIZE) for domain in FLAT]).to(self.device))
        self.network.save_pretrained(folder, torch.float16)
        with (Path(folder) / CURVE_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("step", "train_loss", "val_accuracy"))
            writer.writerows((step, f"{loss:.4f}", f"{accuracy:.5f}") for step, loss, accuracy in self.curve)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"] = self.curve

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.configure_model()
        self.curve = [tuple(row) for row in checkpoint["curve"]]


def _mean_where(errors: Tensor, shown: Tensor) -> Tensor:
    """Mean of ``errors`` [B] over the rows where ``shown`` [B]; 0 where there is none."""
    weight = shown.to(errors.dtype)
    return (errors * weight).sum() / weight.sum().clamp_min(1)


def gaussian_blur(images: Tensor, std: Tensor, radius: int = 2) -> Tensor:
    """Blur image i of [B, C, H, W] with a Gaussian of ``std[i]`` pixels (0: unchanged), edges repeated."""
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    weights = (-0.5 * (offsets / std.clamp_min(1e-3)[:, None]) ** 2).exp()
    weights = (weights / weights.sum(1, keepdim=True)).T.reshape(len(offsets), -1, 1, 1, 1)
    for dim, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded = F.pad(images, padding, mode="replicate")
        size = images.shape[dim]
        images = torch.stack([w * padded.narrow(dim, i, size) for i, w in enumerate(weights)]).sum(0)
    return images

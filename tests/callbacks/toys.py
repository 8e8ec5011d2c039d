"""A small LightningModule, written as anyone would, for trying the callbacks on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.metrics.toys import TinyFeatures, images

SIZE = 8
REFERENCE = ((images(40, SIZE, seed=5) + 1) * 127.5).round().to(torch.uint8)
SHOTS = images(3, SIZE, seed=6)


class Data(pl.LightningDataModule):
    """Training images, sample seeds, and the two attributes the callbacks look for."""

    def __init__(self, seeds: int = 24, batch: int = 10, loaders: int = 1, first: int = 0) -> None:
        super().__init__()
        self.seeds, self.batch, self.loaders, self.first = seeds, batch, loaders, first
        self.reference, self.shots = REFERENCE, SHOTS

    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(8, SIZE, seed=7), batch_size=2)

    def val_dataloader(self) -> Any:
        loader = DataLoader(range(self.first, self.first + self.seeds), batch_size=self.batch)
        return loader if self.loaders == 1 else [loader] * self.loaders

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class Plain(Data):
    """A DataModule that knows nothing of reference images or shots."""

    def __init__(self) -> None:
        super().__init__()
        del self.reference, self.shots


class Toy(pl.LightningModule):
    """Learns a mean image; a sample is that mean plus noise of its own seed. Training draws random numbers."""

    def __init__(self, extra: bool = True, scale: float = 0.3) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3, SIZE, SIZE))
        self.dropout = nn.Dropout(0.5)
        self.extra, self.scale = extra, scale

    def sample(self, seeds: Tensor) -> Tensor:
        noise = [torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
        return (self.mean.detach().cpu() + self.scale * torch.stack(noise)).clamp(-1, 1).to(self.device)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        noisy = batch + 0.1 * torch.randn_like(batch)
        return (self.dropout(self.mean.expand_as(noisy)) - noisy).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        outputs: dict[str, Any] = {"samples": self.sample(batch)}
        return outputs | {"seeds": batch, "weights": "raw"} if self.extra else outputs

    test_step = validation_step
    predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Prompted(Toy):
    """A :class:`Toy` that is asked for one of two prompts, in turn."""

    PROMPTS = ("a prt dog", "red prt dog")

    def prompts(self, seeds: Tensor) -> list[str]:
        return [self.PROMPTS[int(s) // 2 % 2] for s in seeds]

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return super().validation_step(batch, batch_idx) | {"prompts": self.prompts(batch)}

    test_step = validation_step


class Judge(TinyFeatures):
    """Features with a classifier: bright images wear dark glasses."""

    categories = {"glasses": ["none", "dark"], "species": ["person", "cat"]}  # noqa: RUF012

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        bright = (images.mean((1, 2, 3)) > 0).long()
        return {"glasses": bright, "species": torch.zeros_like(bright)}


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet CPU trainer: 6 steps, validation every 3."""
    defaults: dict[str, Any] = {
        "max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0,
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(defaults | options))

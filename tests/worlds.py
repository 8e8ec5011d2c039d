"""Tiny worlds with known answers that several tests use."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.io import write_png

import unidad_pl
from unidad_pl import Denoiser, DenoiserSource, NewUNet, OptimizerOptions, UniDAD
from unidad_pl.condition import Condition
from unidad_pl.data.batch import Batch
from unidad_pl.data.stream import ShotStream
from unidad_pl.denoiser import Prediction

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class GaussianDenoiser(Denoiser):
    """The exact denoiser of data N(mu, 1): ``E[x0 | x] = (x + sigma^2 mu) / (1 + sigma^2)``."""

    def __init__(self, mu: float, size: int = 8) -> None:
        super().__init__()
        self.image_shape = (1, size, size)
        self.mu = nn.Parameter(torch.tensor(float(mu)))

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        s2 = sigma.view(-1, 1, 1, 1) ** 2
        x0 = (x + s2 * self.mu) / (1 + s2)
        return Prediction(x0, (x - self.mu) * s2.sqrt() / (1 + s2))

    def taps(
        self, x: Tensor, sigma: Tensor, cond: Condition | None = None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        return {"in0": x * self.mu}

    @property
    def tap_channels(self) -> dict[str, int]:
        return {"in0": 1}


class AffineStudent(GaussianDenoiser):
    """``G(x, sigma) = x / sigma + mu``: one step from noise gives N(mu, 1) exactly."""

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        z = x / sigma.view(-1, 1, 1, 1)
        return Prediction(z + self.mu, z)


class TwoLayers(Denoiser):
    """A network of two convolutions, for what does not depend on the networks."""

    image_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def hidden(self, x: Tensor, sigma: Tensor) -> Tensor:
        return nn.functional.silu(self.first(x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()))

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        noise = self.last(self.hidden(x, sigma))
        return Prediction(x - sigma.view(-1, 1, 1, 1) * noise, noise)

    def taps(
        self, x: Tensor, sigma: Tensor, cond: Condition | None = None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        return {"in0": self.hidden(x, sigma)}

    @property
    def tap_channels(self) -> dict[str, int]:
        return {"in0": 4}


class Layers(DenoiserSource):
    """Two layers whose weights are the same in every process."""

    def build(self) -> Denoiser:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TwoLayers()


class Gaussian(DenoiserSource):
    def __init__(self, mu: float, kind: type[GaussianDenoiser] = GaussianDenoiser) -> None:
        self.mu, self.kind = mu, kind

    def build(self) -> Denoiser:
        return self.kind(self.mu)


KINDS = dict(
    student="StudentOptions", fake_score="FakeScoreOptions", target_teacher="TargetTeacherOptions",
    adaptation="AdaptationOptions", matching="MatchingOptions", denoising="DenoisingOptions", gan="GANOptions",
    training="TrainingOptions", memory="MemoryOptions", augmentation="Augmentation", reference="Reference",
    evaluation="Evaluation", prompts="PromptOptions", prior="Prior",
)  # fmt: skip


def groups(**flat: Any) -> dict[str, Any]:
    """Option groups from flat names: ``groups(student__num_steps=2)`` is ``{"student": StudentOptions(num_steps=2)}``.

    A group that is given itself, such as ``target_teacher=None``, stands against its parts.
    """
    whole = {name: value for name, value in flat.items() if "__" not in name}
    return whole | {name: getattr(unidad_pl, KINDS[name])(**groups(**part)) for name, part in _parts(flat).items()}


def nested(**flat: Any) -> dict[str, Any]:
    """The same as in YAML: ``{"student": {"num_steps": 2}}``."""
    whole = {name: value for name, value in flat.items() if "__" not in name}
    return whole | {name: nested(**options) for name, options in _parts(flat).items()}


def _parts(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        group, _, option = name.partition("__")
        if option and group not in flat:
            parts.setdefault(group, {})[option] = value
    return parts


def tiny_unet(**overrides: Any) -> NewUNet:
    """A two-level UNet with attention at 16 px: about 60 thousand parameters."""
    shape = dict(channels=(16, 24), layers=1, attention_levels=(1,), head_channels=8, norm_groups=4, patch_size=2)
    return NewUNet(**(dict(resolution=16) | shape | overrides))  # type: ignore[arg-type]


def optimizers(same: OptimizerOptions) -> dict[str, Any]:
    """The same for every network that is trained."""
    return dict(student__optimizer=same, fake_score__optimizer=same, target_teacher__adaptation__optimizer=same)


FAST = OptimizerOptions(lr=1e-3, warmup=0)


def unidad(source: DenoiserSource | None = None, kind: type[UniDAD] = UniDAD, **flat: Any) -> UniDAD:
    """Uni-DAD where everything that can learn does so at once, with an average; ``flat`` as for :func:`groups`."""
    settings = dict(student__update_every=2, target_teacher__weight=0.5, training__ema_decay=0.9) | optimizers(FAST)
    return kind(source or tiny_unet(), **groups(**(settings | flat)))


class Stream(pl.LightningDataModule):
    """Endless batches of ``images`` [N, C, H, W] uint8, and evaluation seeds 0..n-1."""

    def __init__(self, images: Tensor, batch_size: int = 4, seeds: int = 4, flip: bool = False) -> None:
        super().__init__()
        self.images, self.size, self.seeds, self.flip = images, batch_size, seeds, flip

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        place = trainer.world_size, trainer.global_rank
        stream = ShotStream(self.images, self.size, self.flip, 0, lambda: trainer.global_step, *place)
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader([{"seeds": torch.arange(self.seeds)}], batch_size=None)  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader


def random_images(n: int = 6, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(7)).to(torch.uint8)


def save_pictures(folder: Path, n: int = 6) -> Path:
    """The random images as files 0.png, 1.png, ... of a new folder."""
    folder.mkdir(parents=True)
    for i, picture in enumerate(random_images(n)):
        write_png(picture, str(folder / f"{i}.png"))
    return folder


def fit(module: pl.LightningModule, steps: int, data: Any = None, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    """Fit for ``steps`` iterations on the CPU, without files unless ``options`` ask for them."""
    settings: dict[str, Any] = dict(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer = pl.Trainer(**(settings | options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data or Stream(random_images()), ckpt_path=ckpt_path)
    return trainer


def weights_sha(module: nn.Module) -> str:
    """sha256 over every tensor of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""A diffusers pipeline that draws images from a few-step student. It needs torch and diffusers, not unidad_pl.

``unidad export`` puts this file beside the weights::

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    images = pipe(seeds=[0, 1, 2]).images
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils import logging

logger = logging.get_logger(__name__)
PLAIN: dict[str, Any] = {"prediction": "epsilon", "sigma_data": 0.5, "patch_size": 1, "timestep": "nearest"}


class FewStepPipeline(DiffusionPipeline):
    """Few-step sampling of a denoiser ``D(x, sigma) -> x0``: noise, denoise, add fresh noise at the next sigma, ...

    Args:
        scheduler: holds the betas the network was trained with (variance-preserving networks).
        unet: the student, of pixels.
        transformer: the student, of the latents of ``vae``, in place of a UNet.
        vae: what makes pictures of latents.
        sigmas: the trained steps' sigmas, descending.
        sigma_min: the smallest sigma when another number of steps is asked for.
        spec: how to read the network. ``prediction``: what it predicts, ``epsilon``, ``v_prediction``, ``sample``,
            ``edm`` or ``flow``; ``sigma_data``: standard deviation of the data, for ``edm``; ``patch_size``: pixels per
            side folded into channels around it; ``timestep``: ``nearest`` trained one or ``interpolated``.
        classes: labels that seeds take in turn when none are given; None for an unconditional network.
        weights: which of the run's weights these are, ``ema`` or ``raw``.
        iteration: iterations they were trained for.
        resolution: image side in pixels, with a VAE; None: as the network's config says.
    """

    model_cpu_offload_seq = "unet->transformer->vae"
    _optional_components = ["unet", "transformer", "vae"]  # noqa: RUF012 (diffusers wants a list)

    def __init__(
        self,
        scheduler: SchedulerMixin,
        unet: UNet2DModel | None = None,
        transformer: ModelMixin | None = None,
        vae: AutoencoderKL | None = None,
        sigmas: list[float] = [80.0],  # noqa: B006 (diffusers takes arguments without a default for networks)
        sigma_min: float = 0.5,
        spec: dict[str, Any] = PLAIN,
        classes: list[int] | None = None,
        weights: str = "raw",
        iteration: int = 0,
        resolution: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(
            sigmas=list(sigmas), sigma_min=sigma_min, spec={**spec}, classes=None if classes is None else list(classes),
            weights=weights, iteration=iteration, resolution=resolution,
        )  # fmt: skip

    def save_config(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write ``model_index.json`` (``save_pretrained`` does, before it uploads), and what loading needs besides."""
        super().save_config(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text())
        index["_class_name"] = ["pipeline", "FewStepPipeline"]  # the file and the class in it
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n")
        if Path(__file__) != folder.resolve() / "pipeline.py":
            shutil.copyfile(__file__, folder / "pipeline.py")
        spec = dict(self.config.spec)
        if self._is_flow:
            spec |= {"shift": self.scheduler.config.shift, "train_timesteps": self.scheduler.config.num_train_timesteps}
        elif self.config.spec["prediction"] != "edm":
            betas = self.scheduler.config
            spec |= {name: betas[name] for name in ("beta_schedule", "beta_start", "beta_end")}
            spec["train_timesteps"] = betas.num_train_timesteps
        if (folder / "unet").is_dir():  # for unidad_pl alone
            (folder / "unet" / "denoiser.json").write_text(json.dumps(spec, indent=2) + "\n")

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        class_labels: Sequence[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw images.

        Args:
            batch_size: number of images, where neither seeds nor a list of generators says so.
            seeds: one integer per image; image ``s`` is the same in any batch and on any device.
            generator: CPU generators instead: one per image, or one for all.
            num_inference_steps: network evaluations per image; None: as trained.
            class_labels: one label per image, for a class-conditional network.
            output_type: ``pil``, ``np`` ([B, H, W, 3] in [0, 1]) or ``pt`` ([B, 3, H, W] in [0, 1]).
            return_dict: return an ``ImagePipelineOutput``, else a tuple with the images.

        Raises:
            ValueError: seeds and generators together, another number of generators or labels than images, fewer than
                one step, or an unknown output type.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
        generators = self._generators(batch_size, seeds, generator)
        count = len(generators)
        labels = self._labels(class_labels, seeds, count)
        network = self._network().config
        channels, side = network.in_channels, network.sample_size
        if self.vae is not None and self.config.resolution:
            side = self.config.resolution // 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = (side, side) if isinstance(side, int) else side
        fold = self.config.spec["patch_size"]
        shape = (channels // fold**2, height * fold, width * fold)
        device = self._execution_device

        def noise() -> torch.Tensor:
            return torch.stack([torch.randn(*shape, generator=one) for one in generators]).to(device)

        sigmas = self._sigmas(num_inference_steps)
        x = (sigmas[0] + self._is_flow) * noise()  # a flow begins at noise of unit variance
        x0 = self._denoise(x, sigmas[0], labels)
        for sigma in self.progress_bar(sigmas[1:]):
            x0 = self._denoise(x0 + sigma * noise(), sigma, labels)
        if self.vae is not None:
            latents = x0 / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
            x0 = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        self.maybe_free_model_hooks()
        images: Any = (x0.clamp(-1, 1).cpu() + 1) / 2
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _is_flow(self) -> bool:
        return self.config.spec["prediction"] == "flow"

    def _network(self) -> Any:
        return self.unet if self.transformer is None else self.transformer

    def _generators(self, batch_size: int, seeds: Any, generator: Any) -> list[torch.Generator | None]:
        if seeds is not None and generator is not None:
            raise ValueError("give seeds or generators, not both")
        listed = None if isinstance(generator, torch.Generator) else generator
        if batch_size < 1 or any(one is not None and list(one) == [] for one in (seeds, listed)):
            raise ValueError("there is no image to draw: give at least one seed or generator, or a batch_size of 1")
        if seeds is not None:
            return [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        if generator is None or isinstance(generator, torch.Generator):
            return [generator] * batch_size
        if batch_size not in (1, len(generator)):
            raise ValueError(f"batch_size is {batch_size}, but there are {len(generator)} generators")
        return list(generator)

    def _labels(self, given: Any, seeds: Any, count: int) -> torch.Tensor | None:
        classes, config = self.config.classes, self._network().config
        total = config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0
        if classes is None and total:
            classes = list(range(total))
        if classes is None:
            if given is not None:
                raise ValueError("class_labels were given, but this model is unconditional")
            return None
        if given is None:
            numbers = range(count) if seeds is None else seeds
            given = [classes[int(number) % len(classes)] for number in numbers]
        if len(given) != count:
            raise ValueError(f"{count} images need {count} class_labels, got {len(given)}")
        known = range(total)
        if not all(isinstance(label, (int, np.integer)) and label in known for label in given):
            raise ValueError(f"class_labels must be whole numbers in 0..{total - 1}, got {list(given)}")
        return torch.tensor([int(label) for label in given], device=self._execution_device)

    def _sigmas(self, steps: int | None) -> list[float]:
        trained = list(self.config.sigmas)
        if steps is None or steps == len(trained):
            return trained
        if type(steps) is not int or steps < 1:
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, got {steps}")
        if steps > len(trained):
            logger.warning(f"this student was trained for {len(trained)} steps; {steps} need not be better")
        if self._is_flow and torch.allclose(self._own(len(trained)), torch.tensor(trained).double()):
            return self._own(steps).tolist()
        u = torch.linspace(0, 1, steps, dtype=torch.float64)
        return ((1 - u) * math.log(trained[0]) + u * math.log(self.config.sigma_min)).exp().tolist()

    def _own(self, steps: int) -> torch.Tensor:
        """The sigmas of evenly spaced times of a flow, shifted as in its training, up to t = 0.999."""
        u, shift = 1 - torch.arange(steps, dtype=torch.float64) / steps, self.scheduler.config.shift
        t = (shift * u / (1 + (shift - 1) * u)).clamp_max(0.999)
        return t / (1 - t)

    def _denoise(self, x: torch.Tensor, sigma: float, labels: torch.Tensor | None) -> torch.Tensor:
        """``x0`` [B, C, H, W]: the network between its input scale and its output coefficients, in float32."""
        levels = x.new_full((len(x),), sigma)
        s, data = levels.view(-1, 1, 1, 1), self.config.spec["sigma_data"]
        total = s**2 + data**2
        c = {"edm": total.rsqrt(), "flow": 1 / (1 + s)}.get(self.config.spec["prediction"], (1 + s**2).rsqrt())
        of_x, of_f = {
            "epsilon": (torch.ones_like(s), -s),
            "v_prediction": (c**2, -s * c),
            "sample": (torch.zeros_like(s), torch.ones_like(s)),
            "edm": (data**2 / total, s * data * c),
            "flow": (c, -s * c),
        }[self.config.spec["prediction"]]
        folded = F.pixel_unshuffle(c * x, self.config.spec["patch_size"])
        network = self._network()
        f = network(folded.to(network.dtype), timestep=self._time(levels), class_labels=labels).sample
        f = f[:, : folded.shape[1]].float()  # some networks predict a variance too
        return of_x * x + of_f * F.pixel_shuffle(f, self.config.spec["patch_size"])

    def _time(self, sigma: torch.Tensor) -> torch.Tensor:
        if self.config.spec["prediction"] == "edm":
            return 250 * sigma.log() / 4
        if self._is_flow:
            return self.scheduler.config.num_train_timesteps * sigma / (1 + sigma)
        abar = self._abar().to(sigma.device)
        if self.config.spec["timestep"] == "nearest":
            return (1 / (1 + sigma**2)[:, None] - abar).abs().argmin(dim=1)
        table = ((1 - abar.double()) / abar.double()).sqrt().log()
        level = sigma.double().log().clamp(table[0], table[-1])
        right = torch.searchsorted(table, level).clamp(1, len(table) - 1)
        low, high = table[right - 1], table[right]
        return (right - 1 + (level - low) / (high - low)).to(sigma.dtype)

    def _abar(self) -> torch.Tensor:
        """Cumulative signal variance [T]; linear betas in double precision, as the student was trained with."""
        betas = self.scheduler.config
        if betas.beta_schedule != "linear":
            return self.scheduler.alphas_cumprod
        line = torch.linspace(betas.beta_start, betas.beta_end, betas.num_train_timesteps, dtype=torch.float64)
        return torch.cumprod(1 - line, dim=0).float()

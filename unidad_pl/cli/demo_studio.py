"""What the demo draws, without the page: by seed, beside the source model, and between two noises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unidad_pl.arguments import known_classes, rebuild
from unidad_pl.checks import check_at_least
from unidad_pl.cli.drawing import device_of, drawn, load_model
from unidad_pl.condition import Condition
from unidad_pl.data.pictures import as_uint8
from unidad_pl.denoiser import Denoiser, DenoiserSource, guided
from unidad_pl.export.card import config_of_card
from unidad_pl.runs.student import Weights
from unidad_pl.sampling import Noise, heun, sampling_sigmas, seeded_noise
from unidad_pl.seeds import MOST_SEED
from unidad_pl.training.conditions import ClassLabels

MOST_IMAGES = 64
MOST_STEPS = 16
"""Of a student that was trained for no more."""
SOURCE_STEPS = 25


@dataclass
class Original:
    """The model that a student was made from.

        >>> Original(None, "its folder is not here").why
        'its folder is not here'

    Attributes:
        network: None: it was not found.
        why: where it is from, or why it is not there; a sentence.
        guidance_scale: of the student's training.
    """

    network: Denoiser | None
    why: str
    guidance_scale: float = 1.0


def _entries(config: Any, *names: str) -> dict[str, Any]:
    """What a config has at ``names``, one in the other; empty where that is no mapping: anyone may edit a card."""
    for name in names:
        config = config.get(name) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From ``a`` (share 0) to ``b`` (share 1) along the sphere: what lies between two noises is as strong as they are.

    >>> slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), 0.5)
    tensor([1.4142, 1.4142])
    """
    cosine = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)
    angle = torch.arccos(cosine.clamp(-1, 1))
    if torch.sin(angle) < 1e-4:  # one direction, or opposite ones: no way is the shortest
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def walking_noise(first: int, last: int, count: int, shape: tuple[int, ...], device: torch.device | str) -> Noise:
    """Noise [count, *shape] whose rows go from that of seed ``first`` to that of seed ``last``, in every draw."""
    ends = seeded_noise([first, last], shape, "cpu")

    def noise() -> Tensor:
        a, b = ends()
        return torch.stack([slerp(a, b, place / (count - 1)) for place in range(count)]).to(device)

    return noise


class Studio:
    """A student that draws what the demo's page asks for.

        >>> studio = Studio(Path("export"))  # doctest: +SKIP
        >>> studio.sample(seed=0, count=8, num_steps=2).shape  # doctest: +SKIP
        torch.Size([8, 3, 32, 32])

    Args:
        model: a directory that ``unidad export`` wrote, or a checkpoint.
        weights, config: of a checkpoint.
        device: ``cpu``, ``cuda``, or ``auto``.

    Raises:
        FileNotFoundError, ValueError: the model cannot be loaded; says why.
    """

    def __init__(self, model: Path, weights: Weights = "auto", config: str | None = None, device: str = "auto") -> None:
        self.name, self.student = str(model), load_model(model, weights, config)
        self.device = device_of(device)
        self.student.network.to(self.device)
        self.labels = ClassLabels(self.student.network.num_classes, self.student.classes)
        self.most_steps = max(MOST_STEPS, len(self.student.sampler))
        self._original: Original | None = None
        self._config = self.student.config or config_of_card(model)

    @property
    def takes_prompts(self) -> bool:
        """Whether the student is a text-to-image model."""
        return self.student.network.takes_prompts

    @property
    def original(self) -> Original:
        """The source model, loaded when it is first asked for."""
        if self._original is None:
            self._original = self._find_original()
            if self._original.network is not None:
                self._original.network.to(self.device)
        return self._original

    def _find_original(self) -> Original:
        described = _entries(self._config, "model", "init_args", "source")
        if "class_path" not in described:
            return Original(None, "The model does not say which source it was made from.")
        import unidad_pl.backbones  # noqa: F401 (so that its classes are known)

        known = known_classes(DenoiserSource)
        known |= {f"unidad_pl.{kind.__name__}": kind for path, kind in known.items() if path.startswith("unidad_pl.")}
        scale = _entries(self._config, "model", "init_args", "matching").get("guidance_scale") or 1.0
        try:
            check_at_least(0, guidance_scale=scale)
            source = rebuild({"init_args": {}} | described, known)
            if not isinstance(source, DenoiserSource):
                raise ValueError(f"{described['class_path']!r:.80} with {sorted(map(str, described))} describes none")
            network = source.build().eval().requires_grad_(False)
        except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
            return Original(None, f"The source model is not shown: {error}")
        if network.image_shape != self.student.network.image_shape:
            return Original(None, f"The source model is not shown: it draws {network.image_shape}, the student another")
        places = [value for value in _entries(described, "init_args").values() if isinstance(value, str)]
        return Original(network, f"{described['class_path']} {', '.join(places)}".strip(), float(scale))

    def sample(self, seed: int, count: int, num_steps: int | None = None, prompt: str | None = None) -> Tensor:
        """Pictures [count, 3, H, W] uint8 of the seeds from ``seed`` on; those of ``unidad sample``.

        Raises:
            ValueError: a number out of its range, a prompt for a model that takes none, none for one that does, or a
                model that draws NaN or infinity.
        """
        check_at_least(1, MOST_IMAGES, count=count)
        check_at_least(0, MOST_SEED, seed=seed)
        seeds = list(range(seed, seed + count))
        noise = seeded_noise(seeds, self.student.network.image_shape, self.device)
        return self._draw(noise, self._condition(seeds, prompt), num_steps, seeds)

    def walk(
        self, first: int, last: int, count: int, num_steps: int | None = None, prompt: str | None = None
    ) -> Tensor:
        """Pictures [count, 3, H, W] uint8 from that of seed ``first`` to that of seed ``last``; the class, if there are
        classes, is that of the first.

        Raises:
            ValueError: as of :meth:`sample`.
        """
        check_at_least(2, MOST_IMAGES, count=count)
        check_at_least(0, MOST_SEED, first=first, last=last)
        noise = walking_noise(first, last, count, self.student.network.image_shape, self.device)
        return self._draw(noise, self._condition([first] * count, prompt), num_steps, [first, last])

    @torch.no_grad()
    def source_samples(self, seed: int, count: int, steps: int = SOURCE_STEPS, prompt: str | None = None) -> Tensor:
        """Pictures [count, 3, H, W] uint8 that the source model makes, in many steps, of the noise that the student
        begins with.

        Raises:
            ValueError: as of :meth:`sample`, or there is no source; says why.
        """
        check_at_least(1, MOST_IMAGES, count=count)
        check_at_least(0, MOST_SEED, seed=seed)
        check_at_least(1, 1000, steps=steps)
        network, scale = self.original.network, self.original.guidance_scale
        if network is None:
            raise ValueError(self.original.why)
        seeds = list(range(seed, seed + count))
        cond = self._condition(seeds, prompt)
        away = self.student.codec.embed([""], self.device) if scale > 1 else None

        def denoise(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
            return guided(network, x, sigma, cond, None if away is None else away.expand(len(x)), scale).x0

        sigmas = sampling_sigmas(steps, sigma_max=self.student.sampler.sigmas[0])
        noise = seeded_noise(seeds, network.image_shape, self.device)
        return as_uint8(self.student.codec.decode(heun(denoise, noise, sigmas, cond))).expand(-1, 3, -1, -1)  # type: ignore[arg-type]

    @torch.no_grad()
    def _draw(self, noise: Noise, cond: Condition | None, num_steps: int | None, seeds: list[int]) -> Tensor:
        check_at_least(1, self.most_steps, num_steps=num_steps)
        images = drawn(self.student, self.student.with_steps(num_steps), noise, cond, seeds)
        return as_uint8(images).expand(-1, 3, -1, -1)

    def _condition(self, seeds: list[int], prompt: str | None) -> Condition | None:
        if bool(prompt) != self.takes_prompts:
            raise ValueError("write a prompt" if self.takes_prompts else "the model takes no prompts: leave it out")
        if prompt:
            return self.student.codec.embed([prompt] * len(seeds), self.device)
        return Condition.of(self.labels.of_seeds(torch.tensor(seeds, device=self.device)))

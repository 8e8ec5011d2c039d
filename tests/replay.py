"""Replay recordings of the authors' own training step with this package, and compare every number they hold.

    python -m tests.replay DIR --checkpoint adm_tiny.pt [--config config.json] [--dtype float64|float32|both]

DIR holds ``setup.pt`` and any number of ``iteration_*.pt`` (format: ``tests/fixtures/official_step/README.md``).
Everything random comes from the files; everything computed comes from ``unidad_pl``. Which turns an iteration has
(student sampling, generator, guidance, target teacher) is read off its keys; a turn that is there must be complete,
and a key that no turn computes is an error.

Exit status: 0 all numbers agree, 1 some do not (or keys are missing or unknown), 2 the recording or the checkpoint
cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tests.recording import Comparison, Recording, RecordingError, table
from unidad_pl.backbones.adm import ADMStateDictAdapter, adm_denoiser
from unidad_pl.backbones.adm_config import ADMConfig
from unidad_pl.backbones.unet import UNetDenoiser
from unidad_pl.backbones.weights import State, read_weights
from unidad_pl.denoiser import Denoiser
from unidad_pl.discriminator import MultiHeadDiscriminator
from unidad_pl.losses import GANLoss, critic_loss, denoising_loss, dmd_gradient, dmd_loss, generator_loss
from unidad_pl.sampling import FewStepSampler
from unidad_pl.schedules import karras, linear_abar, log_linear

DTYPES = {"float64": torch.float64, "float32": torch.float32}
GENERATOR_KEYS = ("dmd.*", "ggan.*", "dx.*", "loss_dm", "gen_cls_loss", "generator_loss", "*.student*")
GUIDANCE_KEYS = (
    "fake.*", "critic_*", "loss_fake_mean", "guidance_*", "*.fake", "*.fake.*", "*.guidance", "heads_*", "grad.heads.*",
)  # fmt: skip
TARGET_KEYS = ("tt.*", "loss_target_teacher", "*.target", "grad.target.*")


class Setup:
    """``setup.pt`` and the checkpoint: the networks, the heads, the tables and the configuration.

    Raises:
        RecordingError: missing or contradictory entries, or another checkpoint than the recording's.
        ValueError, FileNotFoundError: checkpoint or config cannot be used; see :mod:`unidad_pl.backbones.adm`.
    """

    def __init__(self, folder: Path, checkpoint: Path, adm: ADMConfig, dtype: torch.dtype) -> None:
        self.dtype, self.adm, self.adapter = dtype, adm, ADMStateDictAdapter(adm)
        self.file = Recording(folder / "setup.pt", dtype)
        self.keys: list[str] = self.file.value("keys", list)
        self.source = read_weights(checkpoint)
        self._check_checkpoint(checkpoint)
        self.table = karras(*map(self.cfg, ("num_train_timesteps", "sigma_min", "sigma_max", "rho")))
        self.networks: dict[str, UNetDenoiser] = {}
        source = self.network("source")
        self.taps: list[str] = self.file.value("taps", list)
        self.head_taps: list[str] = self.file.value("head_taps", list)
        self._check_config(list(source.tap_channels))
        temb = source.unet.time_proj(self.file.value("temb_t"))
        self.file.compare_all("", karras_sigmas=self.table, alphas_cumprod=linear_abar(adm.diffusion_steps), temb=temb)
        self.file.used |= {f"scale.{role}" for role in ("student", "fake", "target")}  # not every recording has all

    def cfg(self, name: str) -> Any:
        """Entry ``cfg.NAME``."""
        return self.file.value(f"cfg.{name}", (int, float, str, list, tuple))

    def _check_checkpoint(self, checkpoint: Path) -> None:
        other = f"{checkpoint} is not the recording's checkpoint"
        lacks, more = sorted(set(self.keys) - set(self.source)), sorted(set(self.source) - set(self.keys))
        if lacks or more:
            raise RecordingError(f"{other}: it lacks {lacks[:5]} and holds {more[:5]} beyond it")
        values = [self.source[key].double() for key in self.keys]
        sums = {"source_sum": [v.sum() for v in values], "source_sq": [v.square().sum() for v in values]}
        for name, ours in sums.items():
            for key, value, mine, seen in zip(self.keys, values, ours, self.file.value(name), strict=True):
                if not abs(mine - seen) <= 1e-9 * (1 + value.abs().sum()):
                    raise RecordingError(f"{other}: {name} of {key} is {mine:.9g}, the recording has {seen:.9g}")

    def _check_config(self, taps: list[str]) -> None:
        expected = {
            "resolution": (self.cfg("resolution"), self.adm.image_size),
            "gan_head_type": (self.cfg("gan_head_type"), "global"),
            "taps": (self.taps, taps),
            "num_train_timesteps": (self.cfg("num_train_timesteps"), self.adm.diffusion_steps),
        }
        if self.cfg("gan_head_layers") == "all":
            expected["head_taps (gan_head_layers 'all')"] = (self.head_taps, taps)
        for name, (seen, supported) in expected.items():
            if seen != supported:
                raise RecordingError(f"{self.file.path}: {name} is {seen!r}, this replay needs {supported!r}")
        if not self.head_taps or not set(self.head_taps) <= set(taps):
            raise RecordingError(f"{self.file.path}: head_taps {self.head_taps} are not among the taps {taps}")

    def network(self, role: str) -> UNetDenoiser:
        """``source``, ``student``, ``fake`` or ``target``: weights ``float32(w (1 + s))``, lifted."""
        if role not in self.networks:
            state: State = {key: self.source[key].float() for key in self.keys}
            if role != "source":
                scales = self.file.value(f"scale.{role}").double()
                if len(scales) != len(self.keys):
                    raise RecordingError(f"{self.file.path}: scale.{role} has {len(scales)} entries")
                state = {k: (w.double() * (1 + s)).float() for (k, w), s in zip(state.items(), scales, strict=True)}
            self.networks[role] = adm_denoiser(self.adm, state).to(self.dtype)
        return self.networks[role]

    @property
    def head_names(self) -> list[str]:
        """The parameters of the heads, tap by tap."""
        return [f"heads.{tap}.{kind}" for tap in self.head_taps for kind in ("weight", "bias")]

    @cached_property
    def critics(self) -> tuple[MultiHeadDiscriminator, MultiHeadDiscriminator]:
        """(one logit per head, their mean): two views of the same heads."""
        channels = {tap: self.network("source").tap_channels[tap] for tap in self.head_taps}
        heads, mean = (MultiHeadDiscriminator(channels, "global", kind) for kind in ("per_head", "mean_logit"))
        weights = {name: self.file.value(name) for name in self.head_names}
        weights = {name: w[None, :, None, None] if name.endswith("weight") else w for name, w in weights.items()}
        heads.load_state_dict(weights, strict=True)
        mean.heads = heads.to(self.dtype).heads
        return heads, mean


class Iteration:
    """One ``iteration_*.pt``, replayed turn by turn."""

    def __init__(self, setup: Setup, path: Path) -> None:
        self.setup, self.file = setup, Recording(path, setup.dtype)
        self.shape = (int(setup.cfg("batch_size")), setup.adm.in_channels, *[setup.adm.image_size] * 2)
        self.loss = cast(GANLoss, setup.cfg("gan_adv_loss"))

    def replay(self) -> Recording:
        """Run every turn the file holds -> the file, with its comparisons and problems."""
        generator, guidance, target = (self.file.holds(*k) for k in (GENERATOR_KEYS, GUIDANCE_KEYS, TARGET_KEYS))
        if not (generator or guidance or target):
            raise RecordingError(f"{self.file.path} holds no turn of an iteration that this replay knows")
        if generator or self.file.holds("unroll.*"):
            x = self.student_images(gradient=generator)
        elif guidance:
            x = self.file.images("x", self.shape)
        if generator:
            self.generator_turn(x)
        if guidance:
            self.guidance_turn(x.detach())
        if target:
            self.target_turn()
        self.file.used.add("real")  # an input that only some turns need
        self.file.finish()
        return self.file

    def student_images(self, gradient: bool) -> Tensor:
        """K applications of the student, every one compared -> x [B, C, H, W]."""
        steps, student = int(self.setup.cfg("num_denoising_step")), self.setup.network("student")
        sigmas = log_linear(steps, self.setup.cfg("conditioning_sigma"), self.setup.cfg("denoising_sigma_end"))
        draws = [self.file.images("unroll.z", self.shape)]
        if steps > 1:
            draws += self.file.images("unroll.eps", (steps - 1, *self.shape)).unbind(0)
        elif self.file.values.get("unroll.eps", torch.empty(0)).numel() == 0:  # one step needs none
            self.file.used.add("unroll.eps")
        calls: list[tuple[Tensor, Tensor]] = []
        hook = student.register_forward_hook(lambda _, inputs, x0: calls.append((inputs[1], x0)))
        with torch.set_grad_enabled(gradient):
            x = FewStepSampler(sigmas, gradient="unroll")(student, iter(draws).__next__)
        hook.remove()
        seen, x0 = (torch.stack(part) for part in zip(*calls, strict=True))
        self.file.compare_all("unroll.", sigma=seen, t=torch.stack([student.time(sigma) for sigma in seen]), x0=x0)
        self.file.compare("x", x)
        return x

    def noisy(self, name: str, clean: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """``clean`` at the recorded index and noise of draw ``name`` -> (noisy [B, C, H, W], sigma [B])."""
        index = self.file.value(f"{name}.index")
        if index.shape != self.shape[:1] or index.min() < low or index.max() > high:
            must = f"must be {self.shape[0]} indices in {low}..{high}"
            raise RecordingError(f"{self.file.path}: {name}.index {index.tolist()} {must}")
        sigma = self.setup.table[index].to(self.setup.dtype)
        self.file.compare_all(f"{name}.", sigma=sigma, t=self.setup.network("source").time(sigma))
        return clean + sigma.view(-1, 1, 1, 1) * self.file.images(f"{name}.eps", self.shape), sigma

    def score(self, name: str, images: Tensor) -> list[Tensor]:
        """The critic's score of ``images``, as :mod:`unidad_pl.losses` wants it."""
        noisy, sigma = self.noisy(name, images, 0, int(self.setup.cfg("diffusion_gan_max_timestep")) - 1)
        taps = self.setup.network("fake").taps(noisy, sigma)
        means = torch.stack([taps[tap].mean(dim=(1, 2, 3)) for tap in self.setup.taps])
        logits, score = (critic(taps) for critic in self.setup.critics)
        self.file.compare_all(f"{name}.", tap_mean=means.mean(1), tap_mean_per_image=means)
        self.file.compare_all(f"{name}.", logits=torch.stack(logits), score=score[0])
        return score

    def generator_turn(self, x: Tensor) -> None:
        """Losses of the student, their gradient on x and on the student."""
        loss = self.setup.cfg("dmd_loss_weight") * self.distribution_matching(x)
        (dx_dm,) = torch.autograd.grad(loss, x, retain_graph=True)
        self.file.compare("dx.dm", dx_dm)
        weight = self.setup.cfg("gen_cls_loss_weight")
        if weight or self.file.holds("ggan.*", "gen_cls_loss", "dx.gan*"):
            adversarial = generator_loss(self.score("ggan", x), self.loss)
            (dx_gan,) = torch.autograd.grad(adversarial, x, retain_graph=True)
            self.file.compare("gen_cls_loss", adversarial)
            self.file.compare_all("dx.", gan=dx_gan, gan_weighted=weight * dx_gan)
            loss = loss + weight * adversarial
        self.file.compare("generator_loss", loss)
        (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
        self.file.compare("dx.total", dx)
        self.gradients(loss, "student", "student")

    def distribution_matching(self, x: Tensor) -> Tensor:
        """The dual-domain DMD loss: a weighted sum over teachers; every part is compared."""
        low, high = int(self.setup.cfg("dmd_min_index")), int(self.setup.cfg("dmd_max_index"))
        clean = x.detach()
        with torch.no_grad():
            noisy, sigma = self.noisy("dmd", clean, low, high)
            fake = self.setup.network("fake").predict(noisy, sigma)
        self.file.compare_all("dmd.", noisy=noisy, fake_x0=fake.x0)
        loss = x.new_zeros(())
        for name in ("source", "target"):
            weight = self.setup.cfg(f"dmd_{name}_weight")
            if not weight and not self.file.holds(f"dmd.{name}_*"):
                continue
            with torch.no_grad():
                teacher = self.setup.network(name).predict(noisy, sigma)
            direction = dmd_gradient(clean, noisy, sigma, fake.eps, teacher.eps, "clean")
            difference = sigma.view(-1, 1, 1, 1) * (teacher.eps - fake.eps)
            normaliser = difference.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)
            part = dmd_loss(x, direction)
            compared = dict(x0=teacher.x0, direction=direction, normaliser=normaliser, loss=part)
            self.file.compare_all(f"dmd.{name}_", **compared)
            loss = loss + weight * part
        self.file.compare("loss_dm", loss)
        return loss

    def denoising(self, name: str, network: Denoiser, clean: Tensor, loss_key: str) -> Tensor:
        """EDM-weighted denoising loss of ``network`` at the recorded draw ``name``."""
        noisy, sigma = self.noisy(name, clean, 0, int(self.setup.cfg("num_train_timesteps")) - 1)
        prediction = network(noisy, sigma)
        loss = denoising_loss(prediction, clean, sigma, "edm", self.setup.cfg("sigma_data"))
        self.file.compare(f"{name}.pred", prediction)
        self.file.compare(loss_key, loss)
        return loss

    def guidance_turn(self, x: Tensor) -> None:
        """Losses of the fake score network and the heads, and their gradients."""
        loss = self.denoising("fake", self.setup.network("fake"), x, "loss_fake_mean")
        weight = self.setup.cfg("cls_loss_weight")
        if weight or self.file.holds("critic_*", "guidance_cls_loss"):
            real = self.score("critic_real", self.file.images("real", self.shape))
            critic = critic_loss(real, self.score("critic_fake", x), self.loss)
            self.file.compare("guidance_cls_loss", critic)
            loss = loss + weight * critic
        self.file.compare("guidance_loss", loss)
        self.gradients(loss, "fake", "guidance", self.setup.critics[0])

    def target_turn(self) -> None:
        """Loss of the target teacher on the real batch, and its gradient."""
        real = self.file.images("real", self.shape)
        loss = self.denoising("tt", self.setup.network("target"), real, "loss_target_teacher")
        self.gradients(loss, "target", "target")

    def gradients(self, loss: Tensor, role: str, group: str, heads: nn.Module | None = None) -> None:
        """Gradient of ``loss`` on network ``role`` and on ``heads``, which are clipped together as ``group``."""
        parameters = dict(self.setup.network(role).unet.named_parameters())
        extra = {} if heads is None else dict(heads.named_parameters())
        every = [*parameters.values(), *extra.values()]
        found = torch.autograd.grad(loss, every, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(every, found, strict=True)]
        mine = self.setup.adapter.from_diffusers(dict(zip(parameters, flat, strict=False)))
        unused = {name for name, g in zip(parameters, found, strict=False) if g is None}
        table = self.setup.adapter.table
        self.file.compare(f"grad_missing.{role}", [k for k in self.setup.keys if unused.issuperset(table[k][0])])

        norm, factor = self._clip(flat)
        total = float(norm)
        norms = torch.stack([mine[key].norm() for key in self.setup.keys])
        self.file.compare(f"grad_norm.{role}", norms, total, each=True)
        for key in self.setup.keys:  # some are recorded in full
            if f"grad.{role}.{key}" in self.file.values:
                self.file.compare(f"grad.{role}.{key}", mine[key], total)
        if heads is not None:
            grads = dict(zip(extra, flat[len(parameters) :], strict=True))
            norms = torch.stack([grads[name].norm() for name in self.setup.head_names]).view(-1, 2)
            self.file.compare("heads_grad_norm", norms, total, each=True)
            for name, grad in grads.items():
                self.file.compare(f"grad.{name}", grad.flatten(), total)
        self.file.compare(f"grad_total_norm.{group}", norm)
        self.file.compare(f"clip_factor.{group}", factor)

    def _clip(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(norm before clipping, factor): torch's clipping, as :meth:`GenerativeModule.step` calls it."""
        probes = [nn.Parameter(torch.empty_like(g)) for g in grads]
        for probe, grad in zip(probes, grads, strict=True):
            probe.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(probes, float(self.setup.cfg("max_grad_norm")))
        after = torch.nn.utils.get_total_norm([cast(Tensor, probe.grad) for probe in probes])
        return norm, after / norm


def run(folder: Path, checkpoint: Path, config: Path | None, dtype: str) -> tuple[list[Comparison], list[str]]:
    """Replay ``folder`` in one dtype -> (all comparisons, problems such as unknown or missing keys).

    Raises:
        RecordingError, ValueError, FileNotFoundError: something is missing or does not fit; names it.
    """
    adm = ADMConfig.load(config or checkpoint.parent / "config.json")
    paths = sorted(folder.glob("iteration_*.pt"))
    if not paths:
        raise RecordingError(f"{folder} has no iteration_*.pt")
    setup = Setup(folder, checkpoint, adm, DTYPES[dtype])
    files = [setup.file, *(Iteration(setup, path).replay() for path in paths)]
    comparisons = [replace(c, key=f"{file.path.stem}/{c.key}") for file in files for c in file.comparisons]
    return comparisons, [problem for file in files for problem in file.problems]


def replay(folder: str | Path, checkpoint: str | Path, config: str | Path | None, dtype: str) -> dict[str, float]:
    """Replay ``folder`` in ``dtype`` (``float64`` or ``float32``).

    Returns:
        ``FILE/KEY`` -> relative error, for everything the recording holds.

    Raises:
        RecordingError: the recording cannot be replayed, misses keys or holds unknown ones, or some error exceeds its
            tolerance; names all of them.
    """
    comparisons, problems = run(Path(folder), Path(checkpoint), None if config is None else Path(config), dtype)
    problems += [f"{c.key}: error {c.error:.2e} exceeds {c.tolerance:.2e}" for c in comparisons if not c.passed]
    if problems:
        raise RecordingError(f"{folder} ({dtype}): " + "; ".join(problems))
    return {c.key: c.error for c in comparisons}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.replay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with setup.pt and iteration_*.pt")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the guided-diffusion weights of the recording")
    parser.add_argument("--config", type=Path, help="JSON of flags (default: config.json beside the checkpoint)")
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], default="both")
    options = parser.parse_args(arguments)
    failed = False
    for dtype in DTYPES if options.dtype == "both" else [options.dtype]:
        try:
            comparisons, problems = run(options.folder, options.checkpoint, options.config, dtype)
        except (ValueError, FileNotFoundError) as error:
            print(f"cannot replay: {error}", file=sys.stderr)
            return 2
        wrong = [c for c in comparisons if not c.passed]
        print(f"\n{options.folder} in {dtype}: {len(comparisons)} keys, {len(wrong)} beyond tolerance")
        failures = [f"{c.key}: {c.error:.3e} > {c.tolerance:.1e}" for c in wrong] + problems
        print("\n".join(table(comparisons) + [f"FAIL {text}" for text in failures]))
        failed |= bool(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

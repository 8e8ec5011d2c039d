"""One iteration of Uni-DAD against a plain implementation of docs/method.md: FLOPs, CPU seconds, peak bytes.

    python -m tests.benchmarks step [--repetitions 3] [--out FILE]

Both do the same (``--check`` compares their gradients in float64). The plain one does what is easiest to write: every
network is evaluated whole and with a graph, the heads read F's encoder through hooks, real and generated images one
after the other. 64 px ADM, 64 channels, multipliers 1, 2, 3, 4, one residual block, attention at 16 and 8, 32 channels
a head: 17,851,974 parameters. Batch 2, K = 3, r = 5, a head on every tap, trained target teacher, float32, one thread.
Amortised: a fifth of an iteration with the student's update and four fifths of one without. Ratios above 1: less here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.measuring import RandomWeights, interleaved, keep
from unidad_pl import UniDAD
from unidad_pl.backbones import ADMConfig
from unidad_pl.backbones.adm import ADMSource
from unidad_pl.cli.report_memory import LiveBytes
from unidad_pl.data.batch import Batch
from unidad_pl.denoiser import DenoiserSource
from unidad_pl.flops import Counting
from unidad_pl.seeds import mix_seed

ADM = ADMConfig(
    image_size=64, num_channels=64, num_res_blocks=1, channel_mult="1,2,3,4", attention_resolutions="16,8",
    num_head_channels=32, resblock_updown=True, learn_sigma=True,
)  # fmt: skip
REFERENCE = ADMSource("none", ADM)
R = 5


class Plain:
    """The same networks as ``module``, and an iteration written down as docs/method.md reads."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.sigmas = module.sigmas
        self.a, self.gan, self.matching = module.target_options.weight, module.gan, module.matching

    def noisy(self, images: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        sigma = self.sigmas[torch.randint(first, last + 1, (len(images),))].to(images.dtype)
        return images + sigma.view(-1, 1, 1, 1) * torch.randn_like(images), sigma

    def logit(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """The mean logit over heads [B], the taps read by hooks from a whole evaluation of F."""
        unet, seen = self.module.fake_score.unet, []
        layers = [unet.conv_in, unet.mid_block]
        for block in unet.down_blocks:
            layers += [*(block.attentions if hasattr(block, "attentions") else block.resnets)]
            layers += [] if block.downsamplers is None else [*block.downsamplers]
        hooks = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out)) for layer in layers]
        self.module.fake_score(noisy, sigma)
        for hook in hooks:
            hook.remove()
        inner, middle = [one for one in seen if one is not seen[-1]], seen[-1]
        maps = zip(self.module.discriminator.heads.values(), [*inner, middle], strict=True)
        return torch.stack([head(tap.mean((2, 3), keepdim=True)).flatten() for head, tap in maps]).mean(0)

    def losses(self, real: Tensor, update: bool) -> dict[str, Tensor]:
        """Group -> its loss."""
        module, last = self.module, len(self.sigmas) - 1
        x = module.sampler.sigmas[0] * torch.randn_like(real)
        for k, sigma in enumerate(module.sampler.sigmas):
            if k:
                x = x + sigma * torch.randn_like(real)
            with torch.set_grad_enabled(update):
                x = module.student(x, x.new_full((len(x),), sigma))
        found = {"student": self.student_loss(x)} if update else {}
        x = x.detach()
        noisy, sigma = self.noisy(x, 0, last)
        weight = (sigma**-2 + module.denoising.sigma_data**-2).view(-1, 1, 1, 1)
        fake = (weight * (module.fake_score(noisy, sigma) - x) ** 2).mean()
        on_real = F.softplus(-self.logit(*self.noisy(real, 0, last))).mean()
        on_fake = F.softplus(self.logit(*self.noisy(x, 0, last))).mean()
        found["fake"] = fake + self.gan.critic_weight * (on_real + on_fake)
        if update:
            noisy, sigma = self.noisy(real, 0, last)
            weight = (sigma**-2 + module.denoising.sigma_data**-2).view(-1, 1, 1, 1)
            found["target"] = (weight * (module.target_teacher(noisy, sigma) - real) ** 2).mean()
        return found

    def student_loss(self, x: Tensor) -> Tensor:
        low, high = (round(part * len(self.sigmas)) for part in self.matching.range)
        noisy, sigma = self.noisy(x.detach(), low, high)
        fake, loss = self.module.fake_score(noisy, sigma).detach(), x.new_zeros(())
        teachers = ((1 - self.a, self.module.source_teacher), (self.a, self.module.target_teacher))
        for weight, teacher in teachers:
            x0 = teacher(noisy, sigma).detach()
            g = (fake - x0) / (x.detach() - x0).abs().mean((1, 2, 3), keepdim=True)
            loss = loss + weight * 0.5 * F.mse_loss(x, (x - g).detach())
        noisy, sigma = self.noisy(x, 0, len(self.sigmas) - 1)
        return loss + self.gan.student_weight * F.softplus(-self.logit(noisy, sigma)).mean()

    def iteration(self, real: Tensor, update: bool) -> None:
        """Losses, gradients, clipping, AdamW."""
        groups = self.module.groups()
        for name, loss in self.losses(real, update).items():
            parameters = [p for part in groups[name] for p in part["params"]]
            loss.backward(inputs=parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 10.0)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def prepare(self) -> Plain:
        """With optimisers."""
        groups = self.module.groups()
        self.optimizers = {
            name: torch.optim.AdamW([p for part in own for p in part["params"]], lr=2e-6)
            for name, own in groups.items()
        }
        return self


def made(source: DenoiserSource, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A module at the reference setting but for ``options``, its networks built; it trains without a trainer."""
    torch.manual_seed(0)
    module: Any = UniDAD(source, **options)
    module.configure_model()
    with torch.no_grad():  # the three start alike, and diffusers' output layers at zero: gradients would vanish
        for network in (module.student, module.fake_score, module.target_teacher, module.source_teacher):
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    module.to(dtype)
    module.log = lambda *_, **__: None
    return module


def ours(module: Any, step: bool = True) -> Callable[[Tensor, bool], None]:
    """The module's own ``training_step``, its optimisers as the trainer would step them."""
    groups, optimizers = module.groups(), Plain(module).prepare().optimizers

    def backward_into(loss: Tensor, group: str) -> None:
        loss.backward(inputs=[p for part in groups[group] for p in part["params"]])

    def take(group: str) -> bool:
        if step:
            parameters = [p for part in groups[group] for p in part["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizers[group].step()
            optimizers[group].zero_grad()
        return True

    module.backward_into, module.step, module.finish_iteration = backward_into, take, lambda stepped: None

    def iteration(real: Tensor, update: bool) -> None:
        module.iteration = 0 if update else 1
        module.training_step(Batch(real), 0)

    return iteration


def gradients(module: Any) -> dict[str, Tensor]:
    """Group -> its gradient, flat; all gradients are dropped."""
    found = {}
    for name, parts in module.groups().items():
        own = [p for part in parts for p in part["params"]]
        found[name] = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in own])
        for p in own:
            p.grad = None
    return found


def differences(source: DenoiserSource) -> dict[str, float]:
    """Group -> relative difference of both gradients, the same draws in the same order; float64 should be the default
    dtype, which is that of the draws too."""
    module = made(source, torch.float64)
    real = torch.rand(2, *module.student.image_shape) * 2 - 1
    ours(module, step=False)(real, True)
    own = gradients(module)
    torch.manual_seed(mix_seed(module.seed, 0, 0))  # as the module does in iteration 0
    plain = Plain(module)
    for name, loss in plain.losses(real, True).items():
        loss.backward(inputs=[p for part in module.groups()[name] for p in part["params"]])
    theirs = gradients(module)
    return {name: float((own[name] - theirs[name]).norm() / theirs[name].norm()) for name in own}


def measured(repetitions: int) -> dict[str, Any]:
    """FLOPs, peak bytes beside the weights, CPU seconds, of both; and the ratios of the amortised ones."""
    module = made(RandomWeights(REFERENCE))
    real = torch.rand(2, 3, 64, 64) * 2 - 1
    kinds = {"ours": ours(module), "plain": Plain(module).prepare().iteration}
    found: dict[str, Any] = {name: {} for name in kinds}
    for name, iteration in kinds.items():
        for phase, update in (("generator", True), ("other", False)):
            counting, live = Counting({}), LiveBytes()
            counting.start()
            iteration(real, update)
            found[name][f"{phase} GFLOP"] = counting.stop().flops / 1e9
            with live:
                iteration(real, update)
            found[name][f"{phase} peak MB"] = live.peak / 1e6
    for phase, update in (("generator", True), ("other", False)):
        turns: dict[str, Callable[[], object]] = {
            name: partial(iteration, real, update) for name, iteration in kinds.items()
        }
        for name, seconds in interleaved(repetitions, **turns).items():
            found[name][f"{phase} seconds"] = seconds
    for own in found.values():
        for unit in ("GFLOP", "seconds"):
            own[f"amortised {unit}"] = own[f"generator {unit}"] / R + own[f"other {unit}"] * (R - 1) / R
    ratios = {key: found["plain"][key] / value for key, value in found["ours"].items()}
    return {"parameters": sum(p.numel() for p in module.student.parameters()), **found, "ratios": ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="compare the gradients instead")
    parser.add_argument("--out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.check:
        torch.set_default_dtype(torch.float64)
    keep(differences(RandomWeights(REFERENCE)) if given.check else measured(given.repetitions), given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

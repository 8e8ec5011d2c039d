"""Every promise of the contract, checked for a backbone: subclass :class:`Conformance`, see docs/backbones.md."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from tests.metrics.toys import refused
from tests.tiny_sd import subject
from tests.worlds import fit, save_pictures, unidad
from unidad_pl import UniDAD
from unidad_pl.backbones import LoRA, nf4
from unidad_pl.backbones.sources import Transformer
from unidad_pl.backbones.transformer import TransformerNetwork
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Codec, guided
from unidad_pl.strategies.fsdp import full, shard
from unidad_pl.training.rehearsal import Rehearsal

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
TINY_VAE: dict[str, Any] = dict(
    block_out_channels=(4, 8), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
)  # fmt: skip


class Words(Codec):
    """Stands in for a VAE and text encoders: averaged pictures, and prompts of as many tokens as they have letters."""

    def __init__(self, network: TransformerNetwork) -> None:
        self.shape, self.sizes = network.image_shape, (network.token_width, network.pooled)

    def encode(self, images: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(images, self.shape[1:])
        return small.repeat(1, self.shape[0] // 3 + 1, 1, 1)[:, : self.shape[0]]

    def decode(self, images: Tensor) -> Tensor:
        return F.interpolate(images[:, :3], (16, 16))

    def embed(self, prompts: Sequence[str], device: Any = "cpu") -> Condition:
        return Condition.cat([condition(len(prompt) + 1, *self.sizes, rows=1) for prompt in prompts])


def condition(length: int, width: int, pooled: int, rows: int = 2) -> Condition:
    """A random one, always the same for a length."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randn(rows, length, width, generator=generator)
    return Condition(tokens=tokens, pooled=torch.randn(rows, pooled, generator=generator) if pooled else None)


class Conformance:
    """A test class for one backbone; set these, and pytest finds the rest."""

    network: type[TransformerNetwork]
    config: ClassVar[dict[str, Any]]
    """Of the diffusers class, as small as it can be: three blocks or more, and 4 x 4 tokens."""
    source: type[Transformer] = Transformer
    scheduler: ClassVar[dict[str, Any]] = FLOW
    latent_channels = 4
    side = 8
    vae: ClassVar[dict[str, Any]] = {}

    def theirs(self, net: Any, scaled: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The diffusers class called as its own pipeline calls it.

        Args:
            net: the class.
            scaled: [B, C, H, W] the pipeline's latents.
            t: [B] the scheduler's timesteps.
            cond: condition of the B rows, all prompts of one length.

        Returns:
            [B, C, H, W] what the pipeline gives its scheduler.
        """
        raise NotImplementedError

    # -- made once -----------------------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return self.save(tmp_path_factory.mktemp("pipeline"))

    def save(self, folder: Path) -> Path:
        """Its pipeline in ``folder``, tiny and without text parts."""
        torch.manual_seed(0)
        net = getattr(diffusers, self.network.diffusers_class)(**self.config)
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(0.05 * torch.randn_like(weight))  # none stays zero
        net.save_pretrained(folder / "transformer")
        tiny = TINY_VAE | {"latent_channels": self.latent_channels}
        getattr(diffusers, self.network.vae)(**tiny | self.vae).save_pretrained(folder / "vae")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(self.scheduler))
        return folder

    @pytest.fixture
    def built(self, folder: Path) -> TransformerNetwork:
        return self.load(folder)

    @pytest.fixture(autouse=True)
    def seeded(self) -> None:
        torch.manual_seed(1)

    def load(self, folder: Path, **options: Any) -> TransformerNetwork:
        pixels = self.side * 2 * self.network.vae_fold
        return self.source(str(folder), **({"resolution": pixels} | options)).build()

    def given(self, network: TransformerNetwork, rows: int = 2) -> tuple[Tensor, Tensor, Condition]:
        """Noisy images, their sigmas and conditions."""
        x, sigma = 3 * torch.randn(rows, *network.image_shape), torch.linspace(0.3, 9.0, rows)
        return x, sigma, self.cond(network, 5, rows)

    def cond(self, network: TransformerNetwork, length: int, rows: int = 2) -> Condition:
        if not network.takes_prompts:
            return Condition(labels=torch.arange(rows) % network.num_classes)  # type: ignore[operator]
        return condition(length, network.token_width, network.pooled, rows)

    # -- the promises --------------------------------------------------------------------------------------------

    def test_it_predicts_what_its_pipeline_does(self, built: TransformerNetwork, folder: Path) -> None:
        net = getattr(diffusers, self.network.diffusers_class).from_pretrained(folder / "transformer").eval()
        flow = built.spec.prediction == "flow"
        for i in (1, 300, len(built.native_sigmas) - 1):
            x, _, cond = self.given(built)
            sigma = built.native_sigmas[i]
            t = (sigma / (1 + sigma)) if flow else torch.tensor(i)
            scale = 1 - t if flow else (1 + sigma**2).rsqrt()
            with torch.no_grad():
                answer = self.theirs(net, scale * x, (1000 * t if flow else t).expand(2), cond)
                found = built.predict(x, sigma.expand(2), cond)
            x0 = scale * x - t * answer if flow else x - sigma * answer
            eps = scale * x + (1 - t) * answer if flow else answer
            torch.testing.assert_close(found.x0, x0, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.eps, eps, atol=1e-4, rtol=1e-4)
            assert found.x0.shape == x.shape
            assert found.x0.dtype == found.eps.dtype == torch.float32

    def test_weights_are_loaded_strictly(self, built: TransformerNetwork, folder: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        (file,) = (folder / "transformer").glob("*.safetensors")
        state = load_file(file)
        assert {name: value.shape for name, value in built.transformer.state_dict().items()} == {
            name: value.shape for name, value in state.items()
        }
        name, value = next(iter(state.items()))
        for wrong, message in (
            (state | {"more": value + 1}, "Unexpected.*more"),
            ({**state, name: value[:1]}, "Misshapen"),
        ):
            save_file({key: one.contiguous() for key, one in wrong.items()}, tmp_path / "wrong.safetensors")
            refused(message, self.load, folder, weights=str(tmp_path / "wrong.safetensors"))
        count = sum(p.numel() for p in built.parameters())
        assert sum(p.numel() for p in self.source(str(folder)).architecture().parameters()) == count

    def test_taps_are_what_hooks_see_and_nothing_behind_them_runs(self, folder: Path) -> None:
        network = self.load(folder, taps="all")
        x, sigma, cond = self.given(network)
        blocks = [block for name in network.lists for block in getattr(network.transformer, name)]
        calls: list[int] = []
        seen: dict[int, Any] = {}
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda _, __, out, i=i: (calls.append(i), seen.update({i: out}))[0])
        with torch.no_grad():
            network(x, sigma, cond)
            whole, calls[:] = dict(seen), []
            taps = network.taps(x, sigma, cond)
        assert calls == list(range(len(blocks)))
        assert list(taps) == list(network.tap_channels) == [f"block{i}" for i in range(len(blocks))]
        side = network.image_shape[1] // network.fold
        for i, (name, tap) in enumerate(taps.items()):
            assert tap.shape == (2, network.tap_channels[name], side, side)
            out = whole[i][-1] if isinstance(whole[i], tuple) else whole[i]
            rows = [out[:, start : start + side * side] for start in range(out.shape[1] - side * side + 1)]
            flat = tap.flatten(2).transpose(1, 2)
            assert sum(torch.equal(flat, one) for one in rows) == 1  # the image's tokens are in one piece
        for last in (0, len(blocks) - 2):
            calls[:] = []
            some = network.taps(x, sigma, cond, [f"block{last}"])
            assert calls == list(range(last + 1))
            assert list(some) == [f"block{last}"]
            torch.testing.assert_close(some[f"block{last}"], taps[f"block{last}"])
        network(x, sigma, cond)
        assert len(calls) == last + 1 + len(blocks)  # it is whole again
        quarters = self.load(folder).tap_channels
        assert set(quarters) < set(taps)
        refused("do not exist", network.taps, x, sigma, cond, ["mid"])

    def test_a_tap_is_where_its_tokens_are(self, built: TransformerNetwork) -> None:
        """What is changed in one corner of the image is seen most in that corner of the first tap."""
        network, (x, sigma, cond) = built, self.given(built)
        changed = x.clone()
        changed[:, :, -network.fold :, : network.fold] += 20
        name = next(iter(network.tap_channels))
        with torch.no_grad():
            before, after = (network.taps(one, sigma, cond, [name])[name] for one in (x, changed))
        moved = (after - before).abs().mean((0, 1))
        assert int(moved.argmax()) == moved.numel() - moved.shape[1]

    def test_gradients_reach_the_input_and_checkpointing_changes_none(self, built: TransformerNetwork) -> None:
        def gradients() -> list[Tensor]:
            x, sigma, cond = self.given(built, 1)
            x.requires_grad_()
            built.zero_grad()
            loss = built(x, sigma, cond).square().mean()
            loss = loss + sum(tap.square().mean() for tap in built.taps(x, sigma, cond).values())
            loss.backward()
            assert x.grad is not None
            return [x.grad, *(p.grad.clone() for p in built.parameters() if p.grad is not None)]

        built.train()
        torch.manual_seed(2)
        want = gradients()
        assert want[0].abs().min(dim=1).values.max() > 0
        built.checkpoint_blocks()
        calls = []
        block = getattr(built.transformer, built.lists[0])[0]
        block.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(2)
        got = gradients()
        assert len(calls) == 4  # forward and again, of both
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)

    def test_bfloat16_is_near_and_answers_in_float32(self, built: TransformerNetwork) -> None:
        given = self.given(built)
        with torch.no_grad():
            want = built(*given)
            with torch.autocast("cpu", torch.bfloat16):
                cast = built(*given)
            stored = copy.deepcopy(built)
            stored.to_bfloat16()
            got = stored(*given)
        kept = {name for name, p in stored.transformer.named_parameters() if p.dtype == torch.float32}
        assert kept
        assert all(name.startswith(built.output_layer) for name in kept)
        for one in (cast, got):
            assert one.dtype == torch.float32
            assert 0 < (one - want).abs().max() < 0.1 * want.abs().max()

    def test_images_of_a_batch_do_not_see_each_other(self, built: TransformerNetwork) -> None:
        x, sigma, cond = self.given(built, 3)
        one = slice(1, 2)
        with torch.no_grad():
            torch.testing.assert_close(
                built(x, sigma, cond)[one], built(x[one], sigma[one], cond[one]), atol=1e-5, rtol=1e-4
            )

    def test_the_condition_matters_and_must_fit(self, built: TransformerNetwork) -> None:
        x, sigma, cond = self.given(built)
        with torch.no_grad():
            assert not torch.allclose(built(x, sigma, cond), built(x, sigma, cond[torch.tensor([1, 0])]))
        for wrong in (None, cond[:1], torch.zeros(2), condition(5, built.token_width + 1, built.pooled)):
            refused("a condition with", built, x, sigma, wrong)
            refused("a condition with", built.taps, x, sigma, wrong)
        blank = built.blank_condition(2)
        assert built(x, sigma, blank).isfinite().all()

    def test_prompts_of_different_lengths_are_guided_as_each_alone(self, folder: Path) -> None:
        network = self.load(folder, taps="all")
        if not network.takes_prompts:
            pytest.skip("it takes class labels")
        x, sigma, cond = self.given(network)
        short = self.cond(network, 3, 1)
        both = Condition.cat([short.expand(2), cond])[torch.tensor([2, 0, 3, 1])]
        twice = torch.cat([x, x])[torch.tensor([2, 0, 3, 1])], torch.cat([sigma, sigma])[torch.tensor([2, 0, 3, 1])]
        with torch.no_grad():
            u, c = network.predict(x, sigma, short.expand(2)), network.predict(x, sigma, cond)
            got = guided(network, x, sigma, cond, short, 3.0)
            alone, mixed = network.taps(x, sigma, short.expand(2)), network.taps(*twice, both)
        torch.testing.assert_close(got.eps, u.eps + 3.0 * (c.eps - u.eps), atol=1e-4, rtol=1e-4)
        for name, tap in alone.items():
            torch.testing.assert_close(mixed[name][[1, 3]], tap, atol=1e-4, rtol=1e-4)

    def test_adapters_share_the_base_and_are_all_that_is_trained(
        self, built: TransformerNetwork, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = self.given(built)
        network = self.load(folder, lora=LoRA(rank=2))
        twin = copy.deepcopy(network)
        with torch.no_grad():
            assert torch.equal(network(*given), built(*given))
            trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
            for p in trained.values():
                p.normal_(std=0.3)
            assert not torch.allclose(twin(*given), built(*given))
            assert torch.equal(network(*given), built(*given))
        layers = {name.split(".lora_")[0] for name in trained}
        assert all(any(layer.endswith(f".{end}") for layer in layers) for end in network.adapted)
        own = dict(network.named_parameters())
        for name, p in twin.named_parameters():
            assert (p is own[name]) == (name not in trained) == (name in network.shared_weights)
        monkeypatch.setattr(nf4, "place_for", lambda weight: weight.device)  # four bits ask for CUDA
        for stored in ("bfloat16", "nf4") if find_spec("bitsandbytes") else ("bfloat16",):
            smaller = self.load(folder, lora=LoRA(rank=2, base_dtype=stored))
            assert {p.dtype for p in smaller.parameters() if p.requires_grad} == {torch.float32}
            answer = smaller(*given)
            assert answer.dtype == torch.float32
            assert smaller.dtype == torch.bfloat16
            assert 0 < float((answer - built(*given)).std() / built(*given).std()) < 0.3, stored

    def test_its_blocks_can_be_sharded(self, built: TransformerNetwork, tmp_path: Path) -> None:
        """On one rank: the sums are those of one process, but parameters are only there around their block's pass."""
        sharded, given = copy.deepcopy(built), self.given(built)
        names = list(built.tap_channels)[:1]

        def loss(network: TransformerNetwork) -> Tensor:
            taps = network.taps(*given, names)  # type: ignore[arg-type]
            return network.predict(*given).x0.square().mean() + sum(tap.square().mean() for tap in taps.values())

        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
        try:
            shard(sharded, init_device_mesh("cpu", (1,)))
            blocks = [block for name in built.lists for block in getattr(sharded.transformer, name)]
            assert all(isinstance(block, FSDPModule) for block in blocks)
            for network in (built, sharded):
                loss(network).backward()
            for own, other in zip(built.parameters(), sharded.parameters(), strict=True):
                assert (own.grad is None) == (other.grad is None)
                if own.grad is not None:
                    torch.testing.assert_close(full(other.grad), own.grad, atol=1e-5, rtol=1e-4)
        finally:
            dist.destroy_process_group()

    def module(self, folder: Path, **options: Any) -> UniDAD:
        source_of = self.source

        class Given(source_of):  # type: ignore[misc, valid-type]
            def codec(self) -> Codec:
                return Words(self.architecture())

        pixels = self.side * 2 * self.network.vae_fold
        flow = self.scheduler == FLOW or "Flow" in self.scheduler["_class_name"]
        text: Any = dict(matching__guidance_scale=2.0, target_teacher__adaptation__update="every")
        return unidad(
            Given(str(folder), resolution=pixels, **options), student__num_steps=2, student__update_every=1,
            matching__noise_table="model", matching__normalizer="noisy", memory__checkpointing="blocks",
            denoising__weighting="flow" if flow else "eps", **(text if self.network.takes_prompts else {}),
        )  # fmt: skip

    def data(self, tmp_path: Path) -> Any:
        if self.network.takes_prompts:
            return subject(save_pictures(tmp_path / "photos"))
        return None

    @pytest.mark.slow
    @pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
    def test_uni_dad_trains_it(self, folder: Path, tmp_path: Path, lora: LoRA | None) -> None:
        module = self.module(folder, lora=lora)
        module.configure_model()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        fit(module, 2, self.data(tmp_path))
        moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
        assert {name.split(".")[0] for name in moved} == {
            "student", "fake_score", "target_teacher", "discriminator", "ema",
        }  # fmt: skip
        assert not moved & module.unsaved_weights()
        prompts: Any = {"prompts": ["a dog", "a prt dog"]} if self.network.takes_prompts else {}
        assert module.sample([1, 2], **prompts).isfinite().all()

    @pytest.mark.slow
    def test_its_memory_can_be_rehearsed(self, folder: Path) -> None:
        Rehearsal(self.module(folder), batch_size=2).iteration(0)

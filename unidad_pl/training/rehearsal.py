"""Iterations on tensors without storage: what a run will need, from its module alone; no weights are read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from unidad_pl.checks import check_positive
from unidad_pl.condition import Condition
from unidad_pl.data.batch import Batch
from unidad_pl.denoiser import Codec, Denoiser, DenoiserSource
from unidad_pl.flops import TERA, Counting


class Rehearsal:
    """A module whose networks have shapes and no weights, and which trains without a trainer.

        >>> from unidad_pl import Diffusion, NewUNet
        >>> small = NewUNet(resolution=8, channels=(8,), attention_levels=(), layers=1, head_channels=8, norm_groups=4)
        >>> rehearsal = Rehearsal(Diffusion(small), batch_size=4)
        >>> rehearsal.iteration(0)

    The module is used up: its networks have no weights afterwards.

    Args:
        module: a :class:`~unidad_pl.training.module.GenerativeModule` that was not built yet.
        batch_size: images per process.
        precision: of the trainer: ``32-true``, ``64-true`` or ``bf16-mixed``.

    Attributes:
        gradients: group -> bytes of its gradients, once there were some.
    """

    def __init__(self, module: Any, batch_size: int, precision: str = "32-true") -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        class OnTheCPU(FakeTensorMode):
            avoid_device_init = True  # torch would ask the driver for GPUs at every operation

            def __deepcopy__(self, memo: dict[int, Any]) -> OnTheCPU:
                return self  # a copied network's tensors would be strangers, which no answer is remembered for

        self.module = module
        self.batch_size, self.autocast = batch_size, precision == "bf16-mixed"
        self.mode = OnTheCPU(allow_non_fake_inputs=True)
        self.module.build = lambda source: without_weights(source, self.mode)
        self.module._hashes = dict.fromkeys(module.frozen_networks, "")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks a copied parameter where its storage is
            module.configure_model()
        self._without_trainer()

    def _without_trainer(self) -> None:
        groups = self.groups()

        def backward_into(loss: Tensor, group: str) -> None:
            (loss / self.module.accumulate).backward(inputs=groups[group])

        def step(group: str) -> bool:
            for parameter in groups[group]:
                parameter.grad = None
            return True

        module = self.module
        module.backward_into, module.step, module.finish_iteration = backward_into, step, lambda stepped: None
        module.count = lambda group: None

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Group -> its parameters."""
        groups = self.module.groups()
        return {name: [p for part in parts for p in part["params"]] for name, parts in groups.items()}

    def iteration(self, number: int, *watchers: Any) -> None:
        """Run iteration ``number``, within the context managers ``watchers``."""
        self.module.iteration = number
        with ExitStack() as stack:
            for context in (self.mode, *watchers):
                stack.enter_context(context)
            stack.enter_context(torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # Lightning's, about logging without a trainer
            self.module.training_step(self._batch(), 0)

    def _batch(self) -> Batch:
        """A training batch as the networks see it: latents for a text-to-image model."""
        network, size = self.module.sampled_network, self.batch_size
        images = torch.zeros(size, *network.image_shape)
        if not network.takes_prompts:
            self.module.codec = Codec()
            return Batch(images)  # the module draws labels
        self.module.codec = _Prompts(network)
        return Batch(images, prompts=["a prt dog"] * size, source_prompts=["a dog"] * size)


class Plan:
    """What the iterations of a module will cost.

        >>> from unidad_pl import Diffusion, NewUNet
        >>> small = NewUNet(resolution=8, channels=(8,), attention_levels=(), layers=1, head_channels=8, norm_groups=4)
        >>> Plan(Diffusion(small), batch_size=4).iterations_within(tflops=0.001)
        277

    Args:
        module, batch_size: as of a :class:`Rehearsal`.
    """

    def __init__(self, module: Any, batch_size: int) -> None:
        self.rehearsal = Rehearsal(module, batch_size)
        self._of_kind: dict[object, float] = {}

    def flops(self, number: int) -> float:
        """FLOPs of iteration ``number``; the first of each kind is rehearsed."""
        module = self.rehearsal.module
        module.iteration = number
        kind = module.iteration_kind()
        if kind not in self._of_kind:
            counting = Counting({})
            counting.start()
            self.rehearsal.iteration(number)
            self._of_kind[kind] = counting.stop().flops
        return self._of_kind[kind]

    def iterations_within(self, tflops: float) -> int:
        """How many iterations ``tflops`` are enough for; at least one."""
        check_positive(tflops=tflops)
        left, number = tflops * TERA - self.flops(0), 1
        while (left := left - self.flops(number)) >= 0:
            number += 1
        return number


def without_weights(source: DenoiserSource, mode: Any) -> Denoiser:
    """The network of ``source``, its parameters fake tensors of ``mode`` without storage, its buffers real."""
    with torch.device("meta"):
        network = source.architecture()
    for layer in network.modules():
        for name, weight in layer.named_parameters(recurse=False):
            with mode:
                without_storage = torch.empty(weight.shape, dtype=weight.dtype)
            layer.register_parameter(name, nn.Parameter(without_storage, weight.requires_grad))
        for name, buffer in layer.named_buffers(recurse=False):
            layer.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype), persistent=False)
    if (spec := getattr(network, "spec", None)) is not None:
        network.register_buffer("abar", spec.abar(), persistent=False)
    return network


class _Prompts(Codec):
    """Stands in for VAE and text encoders, which are not on the device while networks train."""

    def __init__(self, network: Denoiser) -> None:
        self.blank = network.blank_condition

    def embed(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Condition:
        found = self.blank(len(prompts))
        assert found is not None
        return found


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of their elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

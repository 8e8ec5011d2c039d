"""Settings for all tests: one thread (tiny tensors), no network, seeded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # Lightning's DDP strategies take all cores where it is not set

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_beginning() -> None:
    """A command that a test ran in this process may have set both."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

"""Settings for all tests: one thread (tiny tensors), no network, seeded."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # Lightning's DDP strategies take all cores where it is not set

import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
# A shell ignores Ctrl-C for what it runs in the background, nohup SIGHUP, and so would everything that tests begin.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests compute of references is kept nowhere else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _same_beginning() -> Iterator[None]:
    """A command that a test ran in this process may have set both, and left a process group."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures in a folder that is named after its subject, dog."""
    place = tmp_path_factory.mktemp("photos") / "dog"
    place.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (60 * i, 200 - 50 * i, 90)).save(place / f"{i}.png")
    return place


LONGEST = (
    "test_fsdp", "test_cli", "test_unidad", "test_faults", "test_student", "test_report_memory", "test_text_to_image",
    "test_lora", "test_failures", "test_resume", "test_study", "test_errors", "test_replay",
)  # fmt: skip
"""Files that take long: begun first, so that no worker is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector would look through it again and again, a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)

"""Fixtures and settings that every test shares."""

import os

import pytest
import torch

# Property tests on shared two-core machines: the clock says nothing about the code.
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
# Where an example is an evidence or two; every case is in other tests as well.
settings.register_profile("engine", settings.get_profile("default"), max_examples=40)
settings.load_profile("default")

# Lightning would write to the working directory and start as many workers as it likes.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# Processes that each take every core slow each other down many times over.
threads = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(threads)
os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the scripts that tests start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what shares a minute's work at the head of a worker's stretch: others take from its end."""

    def of(*names: str) -> list[pytest.Item]:
        return [item for item in items if item.path.stem in names]

    first, second = of("test_figures"), of("test_quickstart", "test_distributed")
    others = [item for item in items if item not in first + second]
    half = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *others[:half], *second, *others[half:]]

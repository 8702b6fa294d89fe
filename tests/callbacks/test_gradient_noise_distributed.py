"""Gradient noise of two processes under DDP is that of one."""

import math

import pytest
import torch

from .noise_ddp_script import CASES, STEPS, run, trained
from .noise_models import SQUARED_NORM, TRACE
from .processes import run_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:GradientNoiseScale. B_simple is not resolved:UserWarning"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the two ranks saved."""
    folder = tmp_path_factory.mktemp("ddp")
    run_script("noise_ddp_script", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", [name for name in CASES if name != "split_batch"])
def test_the_same_number(results, case, tmp_path):
    first, second = (rank[case] for rank in results)
    alone = run(tmp_path, case, 1)
    assert len(first) == len(alone) == STEPS
    assert str(first) == str(second)  # NaN and all
    for found, expected in zip(first, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-10, nan_ok=True)


@pytest.mark.parametrize("case", ["replicas", "replicas and accumulation", "split_batch"])
def test_unbiased(results, case):
    for index, truth in enumerate((TRACE, SQUARED_NORM)):
        values = torch.tensor([estimate[index] for estimate in results[0][case]], dtype=torch.float64)
        error = values.std().item() / math.sqrt(len(values))
        assert abs(values.mean().item() - truth) < 4 * error


def test_a_run_that_learns(results, tmp_path):
    alone = trained(tmp_path, "per_example", 1)
    for rank in results:
        assert list(rank["trained"]) == list(alone)
        for name, noise in alone.items():
            assert rank["trained"][name] == pytest.approx(noise, rel=1e-8, nan_ok=True)

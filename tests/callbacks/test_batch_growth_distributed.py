"""Two processes under DDP grow the batch as one process with twice the batch does."""

import pytest
import torch

from .growth_models import Data, column, fit
from .processes import run_script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function from method and run to what each of the two ranks saved."""
    folder = tmp_path_factory.mktemp("ddp")
    run_script("growth_ddp_script", folder)
    return lambda method, run: [torch.load(folder / f"{method}-{run}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", ["accumulate", "reload"])
def test_replicas_count_and_the_weights_are_those_of_one_process(results, method, tmp_path):
    options = {"factor": 2, "max_batch_size": 48, "method": method}
    one = fit(tmp_path, [1, 2], data=Data(batch_size=8), options=options, max_epochs=3)
    for rank in results(method, "whole"):
        batches = [epoch["batch_size"] for epoch in rank["epochs"]]
        assert batches == column(one, "batch_size") == [8, 16, 32]
        assert [epoch["steps"] for epoch in rank["epochs"]] == column(one, "steps")
        assert [epoch["noise_scale"] for epoch in rank["epochs"]] == [
            pytest.approx(0.1 * (96 / batch - 1) / (1 - 0.9), rel=1e-5) for batch in batches
        ]
        torch.testing.assert_close(rank["weights"], dict(one.network.state_dict()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["accumulate", "reload"])
def test_resumed_bit_by_bit(results, method):
    for whole, resumed in zip(results(method, "whole"), results(method, "resumed"), strict=True):
        assert resumed["epochs"][-1] == whole["epochs"][-1]
        assert all(torch.equal(whole["weights"][name], resumed["weights"][name]) for name in whole["weights"])

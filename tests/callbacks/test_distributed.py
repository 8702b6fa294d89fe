"""Two processes under DDP give the numbers of one, and neither waits for the other."""

import math
from pathlib import Path

import pytest
import torch

from lightning_bayes import LaplaceEvidence, Stability
from lightning_bayes.functional import SavedAdvice
from tests.scenarios import (
    SQUARED_NORM,
    TRACE,
    Module,
    N,
    RegressionData,
    Rich,
    column,
    cross_entropy,
    disagreements,
    fit,
    grow,
    loader,
    optimizer,
    reference,
    tensors,
)

from . import noise_ddp_script
from .processes import run_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:GradientNoiseScale. B_simple is not resolved:UserWarning"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function from the name of a case to what each of the two ranks saved."""
    folder = tmp_path_factory.mktemp("ddp")
    run_script("ddp_script", folder)

    def load(case):
        return [torch.load(folder / f"{case}-{rank}.pt") for rank in range(2)]

    load.folder = folder
    return load


class Fields:
    def __init__(self, fields):
        self.__dict__ = fields


@pytest.mark.parametrize(("case", "scale"), [("uneven", 1), ("drop_last", 1), ("sum", 4)])
def test_evidence_is_that_of_one_process(results, case, scale):
    first, second = results(case)
    assert [epoch for epoch, _ in first["history"]] == [0, 1]
    assert first["history"] == second["history"]
    assert first["logged"] == second["logged"]
    module = Module(Rich(), None)
    module.load_state_dict(first["weights"])
    evidence = Fields(first["history"][-1][1])
    assert evidence.num_examples == N  # not the 22 of the padded shards, nor the 20 or 16 of whole batches
    # Batch norm keeps statistics of its own on each rank; rank 0 counts.
    assert disagreements(evidence, reference(module.network, tensors(), scale=scale)) == {}


def test_noise_scale_counts_the_replicas(results):
    # B = 4 examples x 2 replicas, N the whole training set, learning rate 0.1
    for rank in results("uneven"):
        assert rank["logged"]["bayes/noise_scale"] == pytest.approx(0.1 * (N / 8 - 1))


def test_stability_is_that_of_one_process(results):
    """On a copy with the weights of the end: batches of 4 in the order of one process, batch norm by the batch."""
    first, second = results("uneven")
    assert first["stability"] == second["stability"]
    module = Module(Rich(), cross_entropy, optimizer(lr=0.0))
    module.load_state_dict(first["weights"])
    callback = Stability()
    fit(results.folder, module, loader(batch_size=4, drop_last=True), callback)
    _, reading = first["stability"][-1]
    assert reading["num_examples"] == N // 4 * 4  # batch norm: whole batches
    assert reading["largest_eigenvalue"] == pytest.approx(callback.reading.largest_eigenvalue, rel=1e-6)
    assert reading["stability_ratio"] == pytest.approx(0.1 * (reading["largest_eigenvalue"] + 0.02) / 2)


def test_advice_counts_the_replicas_and_is_saved_once(results):
    first, second = results("uneven")
    assert first["advice"] == second["advice"]
    ((present, checks),) = first["advice"]
    assert present["batch_size"] == 8
    (trainer,) = [check for check in checks if check["name"] == "trainer"]
    assert (
        "accumulate_grad_batches=2 with the DataLoader's batch_size=4 on each of the 2 devices"
        in trainer["sentence"]
    )
    path = Path(first["log_dir"]) / "scaling_advice.json"
    assert SavedAdvice.from_json(path.read_text()).advice[0].present.batch_size == 8


def test_ranks_agree_on_the_epochs_to_skip(results):
    first, second = results("overhead")
    assert [epoch for epoch, _ in first["history"]] == [0]
    assert first["history"] == second["history"]


def test_a_shard_of_a_part_is_refused_by_both(results):
    for rank in results("refused"):
        assert "torch.utils.data.Subset(dataset, indices)" in rank["error"]
        assert rank["steps"] == 0


# One rank fails.


def test_one_rank_fails(results):
    """Both finish training, and both say so: rank 1 why, rank 0 that another could not go on."""
    first, second = (torch.load(results.folder / f"law-6-{rank}.pt") for rank in (0, 1))
    assert first["steps"] == second["steps"] == 4
    for kind, key in ((LaplaceEvidence, "bayes/log_evidence"), (Stability, "bayes/largest_eigenvalue")):
        for rank in (first, second):
            assert math.isnan(rank["logged"][key])
            assert sum(text.startswith(f"{kind.__name__}: ") for text in rank["ours"]) <= 1
        assert any(text.startswith(f"{kind.__name__}: ") for text in first["ours"])
    assert any("KeyError" in text for text in second["ours"])


# The batch grows as in one process with twice the batch.


def growth(results, method, run):
    return [torch.load(results.folder / f"{method}-{run}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", ["accumulate", "reload"])
def test_replicas_count_and_the_weights_are_those_of_one_process(results, method, tmp_path):
    options = {"factor": 2, "max_batch_size": 48, "method": method}
    one = grow(tmp_path, [1, 2], data=RegressionData(batch_size=8), options=options, max_epochs=3)
    for rank in growth(results, method, "whole"):
        batches = [epoch["batch_size"] for epoch in rank["epochs"]]
        assert batches == column(one, "batch_size") == [8, 16, 32]
        assert [epoch["steps"] for epoch in rank["epochs"]] == column(one, "steps")
        assert [epoch["noise_scale"] for epoch in rank["epochs"]] == [
            pytest.approx(0.1 * (96 / batch - 1) / (1 - 0.9), rel=1e-5) for batch in batches
        ]
        torch.testing.assert_close(rank["weights"], dict(one.network.state_dict()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["accumulate", "reload"])
def test_resumed_bit_by_bit(results, method):
    for whole, resumed in zip(
        growth(results, method, "whole"), growth(results, method, "resumed"), strict=True
    ):
        assert resumed["epochs"][-1] == whole["epochs"][-1]
        assert all(torch.equal(whole["weights"][name], resumed["weights"][name]) for name in whole["weights"])


# Gradient noise is that of one process.


def noise(results):
    return [torch.load(results.folder / f"noise-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", [name for name in noise_ddp_script.CASES if name != "split_batch"])
def test_the_same_number(results, case, tmp_path):
    first, second = (rank[case] for rank in noise(results))
    alone = noise_ddp_script.run(tmp_path, case, 1)
    assert len(first) == len(alone) == noise_ddp_script.STEPS
    assert str(first) == str(second)  # NaN and all
    for estimate, expected in zip(first, alone, strict=True):
        assert estimate == pytest.approx(expected, rel=1e-10, nan_ok=True)


@pytest.mark.parametrize("case", ["replicas", "replicas and accumulation", "split_batch"])
def test_unbiased(results, case):
    for index, truth in enumerate((TRACE, SQUARED_NORM)):
        values = torch.tensor([estimate[index] for estimate in noise(results)[0][case]], dtype=torch.float64)
        error = values.std().item() / math.sqrt(len(values))
        assert abs(values.mean().item() - truth) < 4 * error


def test_a_run_that_learns(results, tmp_path):
    alone = noise_ddp_script.trained(tmp_path, "per_example", 1)
    for rank in noise(results):
        assert list(rank["trained"]) == list(alone)
        for name, estimate in alone.items():
            assert rank["trained"][name] == pytest.approx(estimate, rel=1e-8, nan_ok=True)

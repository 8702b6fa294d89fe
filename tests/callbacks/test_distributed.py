"""Two processes under DDP give the numbers of one, and neither waits for the other."""

from pathlib import Path

import pytest
import torch

from lightning_bayes import Stability
from lightning_bayes.functional import SavedAdvice

from .evidence_models import (
    Module,
    N,
    Rich,
    cross_entropy,
    disagreements,
    fit,
    loader,
    optimizer,
    reference,
    tensors,
)
from .processes import run_script

pytestmark = pytest.mark.slow


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

"""The estimate of what an evaluation takes, before it is made."""

import time

import pytest
import torch
from torch import nn

from lightning_bayes import laplace_evidence
from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.evidence.options import Method
from lightning_bayes.evidence.rehearsal import rehearse
from lightning_bayes.likelihoods import resolve_likelihood
from lightning_bayes.priors.prior import prior_from
from lightning_bayes.structures.lanczos.cost import EXPECTED_STEPS
from lightning_bayes.structures.lanczos.row_space import RowSpaceLanczos

NETWORKS = {
    "mlp": (nn.Sequential(nn.Linear(50, 300), nn.ReLU(), nn.Linear(300, 10)), (50,)),
    "conv": (nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10)), (1, 12, 12)),
    "logistic": (nn.Linear(60, 10), (60,)),
}


def rehearsed(network, x, y, method):
    copy = throw_away_copy(network)
    forward = lambda: (copy(x[:64]), y[:64])  # noqa: E731
    likelihood, prior = resolve_likelihood("classification"), prior_from(copy, 1.0)
    return rehearse(copy, forward, likelihood, prior, method, len(x))


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_estimate_is_of_the_right_size(network, structure):
    """Within a factor of three on a quiet machine; a busy one may stall either side."""
    torch.manual_seed(0)
    model, shape = NETWORKS[network]
    x, y = torch.randn(400, *shape), torch.randint(0, 10, (400,))
    estimate = rehearsed(model, x, y, Method(structure)).seconds
    start = time.perf_counter()
    laplace_evidence(model, (x, y), structure=structure, batch_size=64)
    took = time.perf_counter() - start
    assert took / 20 < estimate < 20 * took + 0.2


@pytest.mark.parametrize(
    "method", [Method(), Method("kron"), Method("blocks"), Method(curvature="hessian")], ids=str
)
def test_a_rehearsal_says_what_is_taken_and_how_long(method):
    torch.manual_seed(0)
    network, x, y = nn.Linear(5, 3), torch.randn(100, 5), torch.randint(0, 3, (100,))
    rehearsal = rehearsed(network, x, y, method)
    assert rehearsal.structure == ("full" if method.structure == "auto" else method.structure)
    assert rehearsal.reason and rehearsal.split
    assert 0.0 < rehearsal.seconds < 60.0


@pytest.mark.parametrize("size", [64, 640, 64_000])
def test_a_step_of_lanczos_has_a_part_that_is_the_same_for_all_batches(monkeypatch, size):
    """64 examples a batch, of two rows each: a step takes a second, and a tenth of one for each batch."""
    monkeypatch.setattr(RowSpaceLanczos, "step_seconds", lambda self: 1.0 + 0.1 * len(self.like()) / 128)
    torch.manual_seed(0)
    network, x, y = nn.Linear(5, 3), torch.randn(size, 5), torch.randint(0, 3, (size,))
    seconds = rehearsed(network, x, y, Method("lanczos")).measured["lanczos"]
    assert seconds == pytest.approx(EXPECTED_STEPS * (1.0 + 0.1 * size / 64), rel=0.01, abs=0.1)

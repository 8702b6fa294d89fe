"""Networks and data on which an engine goes wrong without noticing: each was once a silent wrong number."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes import EvidenceUnavailableError, laplace_evidence
from lightning_bayes.likelihoods import Categorical
from lightning_bayes.structures.base import Budget
from tests.cases import evidence_within
from tests.reference import Density, SlowTwin, assert_agrees
from tests.refusals import refuses

F64 = torch.float64


class UsedTwice(nn.Module):
    """A weight that its layer uses, and a functional call besides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x))
        return self.head(torch.tanh(F.linear(x, self.inner.weight, self.inner.bias)))


class Experts(nn.Module):
    """Whole batches take one of two layers of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh((self.one if x[0, 0] > 0 else self.other)(x)))


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("ignored", [[0, 6], [0, 1, 2, 3, 4, 5], []])
def test_a_plan_is_proved_on_examples_that_count(structure, ignored):
    """The rows of ignored examples are zero, and prove any plan right; whole batches may be so."""
    model, x = UsedTwice().double(), torch.randn(12, 5, dtype=F64)
    y = torch.randint(3, (12,))
    y[ignored] = -100
    found = laplace_evidence(model, (x, y), structure=structure, prior_precision=0.1, batch_size=6)
    twin = SlowTwin(model, x, y, Density(lambda f, y: F.cross_entropy(f, y, reduction="sum")))
    assert_agrees(found, twin.evidence(dict.fromkeys(twin.names, 0.1), structure))


def test_no_target_that_counts_is_no_evidence():
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    with refuses("No target counts", error=EvidenceUnavailableError):
        laplace_evidence(model, (x, torch.full((6,), -100)), structure="diag")


@pytest.mark.parametrize("structure", ["full", "blocks", "kron", "diag"])
def test_saturated_outputs_have_no_curvature(structure):
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    model.weight.data.mul_(1e6)
    found = laplace_evidence(model, (x, model(x).argmax(1)), structure=structure)
    assert found.log_occam_factor == pytest.approx(0.0, abs=1e-6)
    assert found.effective_parameters == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("precision", [0.01, 1.0, 100.0])
def test_block_bounds_hold_where_batches_take_different_layers(precision):
    """Landmarks of one expert meet batches of the other."""
    model, x = Experts().double(), torch.randn(160, 4, dtype=F64)
    x = x[x[:, 0].argsort(descending=True)]
    x = torch.cat([x[x[:, 0] > 0][:60], x[x[:, 0] < 0][:60]])
    y = torch.randint(3, (120,))
    arguments = {"prior_precision": precision, "batch_size": 20}
    exact = laplace_evidence(model, (x, y), structure="full", **arguments)
    bounds = evidence_within(Budget(pool_rows=64), model, (x, y), structure="blocks", **arguments)
    assert bounds.lower <= exact.log_evidence <= bounds.upper


@pytest.mark.parametrize("tolerance", [0.5, 5.0])
def test_the_best_prior_of_a_bracket_is_as_good_as_the_bracket_is_narrow(tolerance):
    """Weights twenty times too large: the rows that matter at λ = 1 are not those at the optimum, 0.02."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).double()
    x, y = torch.randn(80, 20, dtype=F64), torch.randint(5, (80,))
    for parameter in model.parameters():
        parameter.data.mul_(20.0)
    arguments = {"structure": "full", "batch_size": 40}
    best = laplace_evidence(model, (x, y), prior_precision="optimize", **arguments)
    found = laplace_evidence(model, (x, y), prior_precision="optimize", tolerance=tolerance, **arguments)
    there = laplace_evidence(model, (x, y), prior_precision=found.prior_precision, **arguments)
    assert found.lower <= there.log_evidence <= found.upper
    assert there.log_evidence >= best.log_evidence - 2 * tolerance


def test_rows_that_are_gone_answer_for_one_prior_alone():
    data = torch.randn(20, 4), torch.randint(3, (20,))
    with refuses('structure="blocks" selects rows as they come'):
        laplace_evidence(nn.Linear(4, 3), data, structure="blocks", prior_precision="optimize_per_parameter")
    with refuses("`tolerance` to be None beside structure='blocks'"):
        laplace_evidence(nn.Linear(4, 3), data, structure="blocks", tolerance=1.0)


def test_a_bracket_beyond_the_budget_is_refused_rather_than_widened():
    data = torch.randn(20, 4), torch.randint(3, (20,))
    with refuses("tolerance=1 is not to be had within the budget", remedy="structure='full'"):
        evidence_within(Budget(seconds=0.0), nn.Linear(4, 3), data, tolerance=1.0)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_sparse_gradients_of_an_embedding(structure):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 3)).double()
    sparse = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3)).double()
    sparse.load_state_dict(dense.state_dict())
    data = torch.randint(7, (9, 2)), torch.randint(3, (9,))
    expected = laplace_evidence(dense, data, structure=structure).log_evidence
    assert laplace_evidence(sparse, data, structure=structure).log_evidence == expected
    assert sparse[0].sparse


def test_one_example_at_a_time():
    torch.manual_seed(0)
    model, x, y = UsedTwice().double(), torch.randn(8, 5, dtype=F64), torch.randint(3, (8,))
    once = laplace_evidence(model, (x, y), structure="full")
    loader = DataLoader(TensorDataset(x, y), batch_size=1)
    singly = laplace_evidence(model, loader, likelihood=Categorical(), structure="full", batch_size=1)
    assert singly.log_evidence == pytest.approx(once.log_evidence, rel=1e-12)

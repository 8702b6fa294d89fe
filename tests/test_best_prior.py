"""The log-evidence at the best prior, against the log-evidence itself over a grid of priors."""

import pytest
import torch
from torch import nn

from lightning_bayes import laplace_evidence
from lightning_bayes.likelihoods import Gaussian
from lightning_bayes.structures.base import Budget
from tests.cases import evidence_within

GRID = torch.logspace(-3, 4, 29).tolist()


def classes():
    return (torch.randn(40, 5), torch.randint(0, 3, (40,))), {}


def real():
    return (torch.randn(40, 5), torch.randn(40, 3)), {"likelihood": "regression"}


def wide():
    return (torch.randn(6, 5), torch.randint(0, 3, (6,))), {}


@pytest.mark.parametrize("prior", [0.03, {"0.*": 1.0, "*": 300.0}], ids=str)
@pytest.mark.parametrize("structure", ["full", "kron", "kron_joint", "diag"])
@pytest.mark.parametrize("make", [classes, real, wide])
def test_it_is_the_largest_of_a_grid(make, structure, prior):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    (x, y), arguments = make()
    data = x.double(), y.double() if y.is_floating_point() else y

    def at(prior_precision):
        return laplace_evidence(net, data, structure=structure, prior_precision=prior_precision, **arguments)

    evidence = at(prior)
    grid = [at(value).log_evidence for value in GRID]
    best = at(evidence.best_prior_precision)
    assert evidence.log_evidence_best_prior == pytest.approx(best.log_evidence, abs=1e-6)
    assert max(grid) - 1e-9 <= evidence.log_evidence_best_prior < max(grid) + 0.6
    assert GRID[0] < evidence.best_prior_precision < GRID[-1]


@pytest.mark.parametrize("structure", ["full", "blocks", "kron"])
def test_at_an_optimized_prior_it_is_the_value(structure):
    torch.manual_seed(0)
    net, data = nn.Linear(5, 3).double(), (torch.randn(40, 5).double(), torch.randint(0, 3, (40,)))
    evidence = laplace_evidence(net, data, structure=structure, prior_precision="optimize")
    assert evidence.log_evidence_best_prior == evidence.log_evidence
    assert evidence.best_prior_precision == evidence.prior_precision
    per_parameter = laplace_evidence(net, data, prior_precision="optimize_per_parameter")
    exact = laplace_evidence(net, data, prior_precision="optimize")
    assert per_parameter.log_evidence_best_prior == pytest.approx(exact.log_evidence, abs=1e-6)


def test_where_it_costs_much_or_does_not_exist_there_is_none():
    torch.manual_seed(0)
    data = (torch.randn(40, 5), torch.randint(0, 3, (40,)))
    assert laplace_evidence(nn.Linear(5, 3), data, structure="blocks").log_evidence_best_prior is None
    assert laplace_evidence(nn.Linear(5, 3), data, num_samples=4).log_evidence_best_prior is None
    zero = nn.Linear(5, 3)
    nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)
    assert laplace_evidence(zero, data).best_prior_precision is None
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    bent = laplace_evidence(net, data, curvature="hessian", prior_precision=100.0)
    assert bent.num_eigenvalues_below_prior > 0
    assert bent.log_evidence_best_prior is None
    narrow = evidence_within(Budget(common_spectrum=4), nn.Linear(5, 3), data)
    assert narrow.log_evidence_best_prior is None


def test_the_noise_is_that_of_the_value():
    torch.manual_seed(0)
    net, data = nn.Linear(5, 1).double(), (torch.randn(40, 5).double(), torch.randn(40, 1).double())
    for likelihood in (Gaussian(sigma=0.3), "regression"):
        evidence = laplace_evidence(net, data, likelihood=likelihood, prior_precision=7.0)
        best = laplace_evidence(net, data, likelihood=likelihood, prior_precision="optimize")
        assert evidence.noise_variance == best.noise_variance
        assert evidence.log_evidence_best_prior == pytest.approx(best.log_evidence, abs=1e-7)

"""Options that both APIs share reach what they are for."""

import logging
import math

import pytest
import torch
from torch import nn

from lightning_bayes import laplace_evidence
from lightning_bayes.evidence.options import Method, sampling_if_many_columns
from lightning_bayes.structures.base import Budget
from tests.cases import evidence_within, make_case


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_sampled_columns_are_right_on_average(structure):
    """Both are concave in G, so the mean over many columns ends near, and the error falls with their number."""
    case = make_case("mlp", "classification", 30)
    exact = case.evidence(structure=structure)
    few, many = (case.evidence(structure=structure, num_samples=n) for n in (8, 4000))
    assert abs(many.log_evidence - exact.log_evidence) < abs(few.log_evidence - exact.log_evidence)
    assert many.log_evidence == pytest.approx(exact.log_evidence, abs=0.2)
    assert (many.num_samples, exact.num_samples) == (4000, None)
    assert few.log_evidence == case.evidence(structure=structure, num_samples=8).log_evidence
    assert exact.log_evidence_stderr == 0.0
    assert 0.0 < many.log_evidence_stderr < few.log_evidence_stderr < 1.0


def test_auto_samples_where_there_are_many_outputs_beyond_its_budget():
    torch.manual_seed(0)
    model, data = nn.Linear(3, 600), (torch.randn(5, 3), torch.randint(600, (5,)))
    with pytest.warns(UserWarning, match=r"600 outputs per example.*structure='kron' with num_samples=64"):
        found = evidence_within(Budget(seconds=0.0), model, data)
    assert (found.structure, found.num_samples) == ("kron", 64)
    given = laplace_evidence(model, data, num_samples=64)
    assert (given.structure, given.log_evidence) == ("kron", found.log_evidence)
    assert laplace_evidence(model, data, structure="diag").num_samples is None


@pytest.mark.parametrize(
    ("network", "inputs", "classes"),
    [
        (nn.Linear(2, 600), torch.randn(4, 2), (600, (4,))),
        (nn.Conv1d(2, 3, 3, padding=1), torch.randn(5, 2, 200), (3, (5, 200))),
    ],
    ids=["classes", "positions"],
)
def test_auto_is_exact_where_that_is_cheap_however_many_outputs(network, inputs, classes):
    data = inputs, torch.randint(*classes)
    got, exact = laplace_evidence(network, data), laplace_evidence(network, data, structure="full")
    assert (got.structure, got.num_samples, got.log_evidence_stderr) == ("full", None, 0.0)
    assert got.log_evidence == pytest.approx(exact.log_evidence, rel=1e-9)


def test_the_error_of_large_factors_is_of_first_order():
    torch.manual_seed(0)
    model, data = nn.Linear(6, 40), (torch.randn(30, 6), torch.randint(40, (30,)))
    arguments = {"structure": "kron", "num_samples": 32}
    jackknife = laplace_evidence(model, data, **arguments)
    quick = evidence_within(Budget(kronecker_left_out=8), model, data, **arguments)
    assert 0.3 < quick.log_evidence_stderr / jackknife.log_evidence_stderr < 3.0
    bias = abs(quick.log_evidence - jackknife.log_evidence)
    assert 0.0 < bias < 0.2 * abs(jackknife.log_occam_factor)


@pytest.mark.parametrize(
    "method",
    [
        Method("full"),
        Method("kron"),
        Method(tolerance=1.0),
        Method(num_samples=3),
        Method(curvature="hessian"),
    ],
    ids=str,
)
def test_what_was_asked_for_is_not_sampled(method):
    assert sampling_if_many_columns(method, torch.zeros(2, 5000), 10**5, 10**6, 256) == (method, None)


def test_few_outputs_are_not_sampled():
    assert sampling_if_many_columns(Method(), torch.zeros(5000, 512), 10**6, 10**7, 256) == (Method(), None)


@pytest.mark.parametrize(
    ("outputs", "num_examples", "num_parameters", "sampled"),
    [
        ((9, 57), 20, 500, False),  # all columns are had for nothing
        ((1000,), 40, 17_000, False),
        ((3, 32, 32), 16, 400, False),
        ((9, 57), 60_000, 10**6, True),  # operations
        ((5000,), 64, 100, True),  # memory
        ((600,), 10**6, 100, True),  # calls
    ],
)
def test_many_outputs_are_sampled_by_what_all_columns_cost(outputs, num_examples, num_parameters, sampled):
    method, why = sampling_if_many_columns(
        Method(), torch.zeros(2, *outputs), num_examples, num_parameters, 32
    )
    assert method == (Method("kron", num_samples=64) if sampled else Method())
    assert (why is not None) == sampled


@pytest.mark.parametrize("tolerance", [0.1, 1.0, 5.0])
def test_a_tolerance_is_the_width_of_a_bracket(tolerance):
    case = make_case("mlp", "classification", 40)
    exact = case.evidence()
    found = case.evidence(structure="full", tolerance=tolerance)
    assert found.lower - 1e-9 <= exact.log_evidence <= found.upper + 1e-9
    assert found.upper - found.lower <= tolerance


@pytest.mark.parametrize("backend", ["auto", "backpack", "autograd"])
@pytest.mark.parametrize("structure", ["full", "diag"])  # without a layer's derivatives kron has exact blocks
def test_backends_agree(backend, structure, caplog):
    case = make_case("conv", "regression")
    with caplog.at_level(logging.INFO, logger="lightning_bayes"):
        found = case.evidence(backend=backend, structure=structure)
    assert found.log_evidence == pytest.approx(case.evidence(structure=structure).log_evidence, rel=1e-10)
    said = [record for record in caplog.records if record.name == "lightning_bayes"]
    assert len(said) == 1  # by which derivatives the rows are read
    assert math.isfinite(found.log_evidence)

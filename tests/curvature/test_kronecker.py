"""KFLR against dense Kronecker products."""

import warnings

import pytest
import torch
from torch import nn

from lightning_bayes import laplace_evidence
from lightning_bayes.structures.base import Budget
from tests import reference_kronecker
from tests.cases import make_case
from tests.reference import assert_agrees


def test_a_precision_for_each_tensor():
    case = make_case("mlp", "regression")
    precision = {name: 10.0 ** (i - 3) for i, name in enumerate(case.names)}
    assert_agrees(
        case.evidence(structure="kron", prior_precision=precision), case.reference(precision, "kron")
    )


def test_one_example_makes_the_product_of_a_linear_layer_exact():
    """A and B are then single outer products, and a layer's block is B ⊗ A itself."""
    case = make_case("linear", "binary", num_examples=1)
    precision = {"weight": 0.2, "bias": 1e12}  # only the weight's block counts
    kron = case.evidence(structure="kron", prior_precision=precision)
    assert kron.log_occam_factor == pytest.approx(case.reference(precision).log_occam_factor, rel=1e-9)


def test_kron_claims_no_bound_but_the_likelihood():
    evidence = make_case().evidence(structure="kron")
    assert evidence.lower == float("-inf")
    assert evidence.upper == evidence.log_likelihood - evidence.weight_penalty


@pytest.mark.parametrize("limit", [0, 5, 40])
@pytest.mark.parametrize("network", ["conv", "batch_norm", "called_twice", "lstm", "tied", "convnext_block"])
def test_large_blocks_without_a_kronecker_form_keep_their_diagonal(network, limit, monkeypatch):
    """Other tensors beyond the limit, but the biases of layers that have the form stay exact."""
    monkeypatch.setattr(reference_kronecker, "MAX_EXACT_BLOCK", limit)
    case = make_case(network, "class_probabilities")
    found = case.evidence(Budget(kronecker_exact=limit), structure="kron", prior_precision=0.3)
    assert_agrees(found, case.reference(0.3, "kron"))


@pytest.mark.parametrize("precision", [0.1, 3.0])
def test_expanded_factors_are_those_of_curvlinops(precision):
    """Its KFAC-expand with the exact output factor, as a dense matrix, on convolutions without biases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        curvlinops = pytest.importorskip("curvlinops")
    layers = (nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Conv2d(3, 4, 2, bias=False))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3, bias=False)).double()
    x, y = torch.randn(5, 2, 5, 5).double(), torch.randint(3, (5,))
    data, loss = [(x[:3], y[:3]), (x[3:], y[3:])], nn.CrossEntropyLoss(reduction="sum")
    kfac = curvlinops.KFACLinearOperator(
        model, loss, list(model.parameters()), data, fisher_type="type-2", kfac_approx="expand"
    )
    eye = torch.eye(sum(p.numel() for p in model.parameters())).double()
    expected = torch.linalg.slogdet(eye + (kfac @ eye) / precision).logabsdet.item()
    found = laplace_evidence(model, (x, y), structure="kron_expand", prior_precision=precision, batch_size=3)
    assert found.log_occam_factor == pytest.approx(-0.5 * expected, rel=1e-8)

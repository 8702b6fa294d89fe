"""KFLR against dense Kronecker products."""

import pytest

from lightning_bayes.curvature import kronecker
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


def test_large_blocks_without_a_kronecker_form_keep_their_diagonal(monkeypatch):
    """Normalisation and recurrent weights beyond the limit: never an approximation above `diag`."""
    monkeypatch.setattr(kronecker, "MAX_EXACT_BLOCK", 0)
    for network in ("batch_norm", "lstm"):
        case = make_case(network, "class_probabilities")
        fallback = case.evidence(structure="kron").log_occam_factor
        monkeypatch.setattr(kronecker, "MAX_EXACT_BLOCK", 1024)
        assert case.evidence(structure="diag").log_occam_factor != fallback
        assert fallback < case.evidence(structure="kron").log_occam_factor  # Hadamard, block by block
        monkeypatch.setattr(kronecker, "MAX_EXACT_BLOCK", 0)

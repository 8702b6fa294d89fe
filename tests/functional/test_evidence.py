"""The terms of the evidence, one identity each."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bayes.functional import evidence as terms

F64 = torch.float64
spectra = st.lists(st.floats(0, 1e6), min_size=1, max_size=6).map(
    lambda values: torch.tensor(values, dtype=F64)
)
precisions = st.floats(1e-6, 1e6)


@given(spectra, precisions)
def test_log_det_is_that_of_the_diagonal_matrix(eigenvalues, precision):
    dense = torch.eye(len(eigenvalues), dtype=F64) + torch.diag(eigenvalues) / precision
    found = terms.log_det_from_eigenvalues(eigenvalues, precision)
    torch.testing.assert_close(found, torch.linalg.slogdet(dense).logabsdet, rtol=1e-9, atol=1e-9)


@given(spectra, precisions)
def test_effective_parameters_are_the_slope_of_the_log_det(eigenvalues, precision):
    """γ = -d ln det(I + G/λ) / d ln λ."""
    log_precision = torch.tensor(math.log(precision), dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(
        terms.log_det_from_eigenvalues(eigenvalues, log_precision.exp()), log_precision
    )
    gamma = terms.effective_parameters(eigenvalues, precision)
    torch.testing.assert_close(gamma, -slope, rtol=1e-9, atol=1e-12)
    assert 0 <= gamma <= len(eigenvalues)


def test_tiny_curvature_is_not_lost_beside_one():
    assert terms.log_det_from_eigenvalues(torch.tensor([1e-20], dtype=F64), 1.0).item() == 1e-20


def test_weight_penalty_broadcasts_its_precision():
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert terms.weight_penalty(weights, 2.0).item() == 30.0
    assert terms.weight_penalty(weights, torch.tensor([2.0, 0.0])).item() == 10.0


@given(st.floats(-1e6, 0), st.floats(0, 1e6), st.floats(0, 1e6))
def test_the_parts_add_up(log_likelihood, penalty, log_det):
    value = terms.log_evidence(log_likelihood, penalty, terms.log_occam_factor(log_det))
    assert value == pytest.approx(log_likelihood - penalty - log_det / 2, rel=1e-12)
    assert value <= log_likelihood


def test_guessing():
    assert terms.log_null_evidence(100, 10) == pytest.approx(-100 * math.log(10))
    assert terms.log_null_evidence(100, 2, 3) == pytest.approx(-300 * math.log(2))

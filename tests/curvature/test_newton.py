"""Conjugate gradients for the Newton decrement end only where little is missing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bayes.row_storage.newton_decrement import quadratic_form
from lightning_bayes.row_storage.stored import KeptDense

LAMBDA = {"w": 1.0}


def with_spectrum(values):
    """Rows whose G + Λ has these eigenvalues, none below 1."""
    rows = torch.diag((torch.tensor(values, dtype=torch.float64) - 1.0).sqrt()).unsqueeze(0)
    return KeptDense(rows, "w", torch.Size([len(values)]))


def found_and_true(values, gradient, tolerance):
    g = torch.tensor(gradient, dtype=torch.float64)
    # As weak a preconditioner as there is: that of no rows.
    found = quadratic_form([with_spectrum(values)], dict, LAMBDA, {"w": g}, tolerance)
    return found, (g.square() / torch.tensor(values, dtype=torch.float64)).sum().item()


def test_a_small_rise_alone_is_no_end():
    found, truth = found_and_true(
        [1.0, 10.49, 18.52, 13.12, 18.98, 21.0, 21.0],
        [-0.72, 0.023, -17.864, -0.271, 0.053, -5.054, 0.42],
        5e-3,
    )
    assert (1 - 5e-3) * truth <= found <= truth * (1 + 1e-12)


entries = st.lists(
    st.tuples(st.floats(1.0, 100.0), st.floats(-10.0, 10.0).filter(lambda g: abs(g) > 1e-3)),
    min_size=1,
    max_size=12,
)


@given(entries, st.sampled_from([1e-2, 1e-3, 1e-7]))
def test_no_more_than_the_tolerance_is_missing(pairs, tolerance):
    found, truth = found_and_true(*zip(*pairs, strict=True), tolerance)
    assert (1 - tolerance) * truth <= found * (1 + 1e-12)
    assert found <= truth * (1 + 1e-10)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_gradients_whose_squares_are_no_numbers_of_float32(size):
    rows = with_spectrum([1.0, 3.0, 9.0]).to(torch.float32)
    g = size * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = quadratic_form([rows], dict, LAMBDA, {"w": g.float()}, 1e-5)
    assert found == pytest.approx(size**2 * (1.0 + 4.0 / 3.0 + 1.0), rel=1e-4)


@pytest.mark.parametrize("size", [0.0, math.inf, math.nan])
def test_gradients_that_leave_nothing_to_climb(size):
    found = quadratic_form([with_spectrum([2.0])], dict, LAMBDA, {"w": torch.tensor([size]).double()})
    assert found == pytest.approx(size, nan_ok=True)


def test_too_few_steps_are_said(monkeypatch):
    monkeypatch.setattr("lightning_bayes.row_storage.newton_decrement.MAX_REFINEMENTS", 2)
    with pytest.warns(UserWarning, match="has not converged in 2 steps"):
        found, truth = found_and_true([1.0, 10.0, 100.0, 1000.0], [1.0, 5.0, 20.0, 100.0], 1e-9)
    assert found < truth

"""Lanczos' method against dense eigenvalues and ARPACK."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh

from lightning_bayes.numerics import lanczos
from lightning_bayes.numerics.lanczos import largest_eigenpair
from tests.refusals import refuses


def symmetric(eigenvalues, seed=0):
    """A dense matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (basis * eigenvalues) @ basis.mT


def found(matrix, tolerance=1e-8, max_products=500, **kwargs):
    return largest_eigenpair(
        matrix.__matmul__,
        torch.zeros(len(matrix), dtype=matrix.dtype),
        tolerance=tolerance,
        max_products=max_products,
        **kwargs,
    )


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(0, 5))
def test_largest_of_any_spectrum(eigenvalues, seed):
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    pair = found(symmetric(values, seed))
    scale = values.abs().max().item()
    assert pair.converged
    assert pair.value == pytest.approx(values.max().item(), abs=1e-7 * scale + 1e-300)
    assert pair.value <= values.max().item() + 1e-12 * scale
    assert pair.vector.norm().item() == pytest.approx(1.0, rel=1e-12)


DECAYING = 10.0 / torch.arange(1, 401, dtype=torch.float64)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
def test_error_is_a_bound_and_within_the_tolerance(tolerance):
    matrix = symmetric(DECAYING)
    pair = found(matrix, tolerance)
    assert pair.converged
    assert pair.error == pytest.approx(
        (matrix @ pair.vector - pair.value * pair.vector).norm().item(), rel=1e-6
    )
    assert pair.error <= tolerance * pair.value
    assert 0 <= 10.0 - pair.value <= pair.error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_arpack_in_fewer_products(dtype):
    matrix = symmetric(DECAYING * torch.where(torch.arange(400) % 3 == 1, -0.9, 1.0).double())
    calls = []

    def product(vector):
        calls.append(1)
        return matrix.numpy() @ vector

    operator = LinearOperator(matrix.shape, matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(len(matrix))
    (expected,) = eigsh(operator, k=1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)
    pair = found(matrix.to(dtype), 1e-3)
    assert pair.value == pytest.approx(expected, rel=1e-5)
    assert pair.num_products < len(calls)


def test_restarts(monkeypatch):
    matrix = symmetric(1.0 - torch.arange(200, dtype=torch.float64) / 400)  # crowded at the top
    whole = found(matrix, 1e-4)
    monkeypatch.setattr(lanczos, "MAX_BYTES", 10 * 200 * 8)
    restarted = found(matrix, 1e-4)
    assert whole.num_products > 10 and restarted.num_products > whole.num_products
    assert restarted.converged
    assert restarted.value == pytest.approx(1.0, abs=1e-6)


def test_a_seed_is_a_result():
    matrix = symmetric(DECAYING)
    first, again, other = found(matrix, 1e-2), found(matrix, 1e-2), found(matrix, 1e-2, seed=1)
    assert torch.equal(first.vector, again.vector)
    assert not torch.equal(first.vector, other.vector)


def test_too_few_products_are_said():
    pair = found(symmetric(DECAYING), 1e-9, max_products=4)
    assert not pair.converged and pair.num_products == 4
    assert 0 < 10.0 - pair.value <= pair.error


@pytest.mark.parametrize("size", [1, 7])
def test_zero_matrix(size):
    pair = found(torch.zeros(size, size, dtype=torch.float64))
    assert (pair.value, pair.error, pair.converged) == (0.0, 0.0, True)


def test_a_matrix_that_is_not_symmetric_is_refused():
    generator = torch.Generator().manual_seed(0)
    noise = 1e-3 * torch.randn(400, 400, generator=generator, dtype=torch.float64)
    with refuses("not those of a symmetric matrix", remedy='curvature="ggn"'):
        found(symmetric(DECAYING) + noise)

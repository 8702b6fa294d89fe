"""Traces of functions by stochastic Lanczos quadrature, held against dense eigenvalues."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bayes.numerics.lanczos_quadrature import LanczosRecurrences, random_signs


def matrix_of(size, *, seed=0, decades=3.0):
    """A symmetric matrix [size, size] with eigenvalues from 1 to 10**decades, and their smallest."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = 10.0 ** (decades * torch.rand(size, generator=generator, dtype=torch.float64))
    return (basis * values) @ basis.mT, values.min().item()


def function_of(matrix, function):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * function(values)) @ vectors.mT


def run(matrix, starts, steps):
    recurrences = LanczosRecurrences(lambda vectors: vectors @ matrix, starts)
    for _ in range(steps):
        recurrences.extend()
    return recurrences


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(4))
def test_the_quadratic_form_lies_between_the_two_rules(steps, seed):
    matrix, least = matrix_of(30, seed=seed)
    starts = random_signs(3, matrix[0], seed)
    recurrences = run(matrix, starts, steps)
    right = ((starts @ function_of(matrix, torch.log)) * starts).sum(1)
    slack = 1e-9 * right.abs().max()
    assert bool((recurrences.gauss(torch.log) >= right - slack).all())
    assert bool((recurrences.radau(torch.log, 0.5 * least) <= right + slack).all())


def test_as_many_steps_as_dimensions_are_exact():
    matrix, least = matrix_of(12)
    starts = random_signs(4, matrix[0])
    recurrences = run(matrix, starts, 12)
    whole = function_of(matrix, torch.log)
    right = ((starts @ whole) * starts).sum(1)
    torch.testing.assert_close(recurrences.gauss(torch.log), right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(recurrences.radau(torch.log, least), right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(recurrences.images(torch.log), starts @ whole, rtol=1e-9, atol=1e-9)
    assert recurrences.exhausted


def test_a_vector_whose_space_ends_does_not_hold_up_the_others():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 2.0, 5.0, 7.0, 11.0], dtype=torch.float64))
    starts = torch.ones(2, 6, dtype=torch.float64)
    starts[0, 3:] = 0.0  # two distinct eigenvalues
    recurrences = run(matrix, starts, 6)
    right = (starts.square() * matrix.diagonal().log()).sum(1)
    torch.testing.assert_close(recurrences.gauss(torch.log), right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(recurrences.radau(torch.log, 0.5), right, rtol=1e-12, atol=1e-12)


def test_the_rules_are_exact_for_polynomials_of_their_degree():
    matrix, least = matrix_of(20, decades=1.0)
    starts = random_signs(2, matrix[0])
    recurrences = run(matrix, starts, 3)
    for degree, rule in [(5, recurrences.gauss), (6, lambda f: recurrences.radau(f, 0.9 * least))]:
        right = ((starts @ torch.linalg.matrix_power(matrix, degree)) * starts).sum(1)
        torch.testing.assert_close(rule(lambda x, d=degree: x**d), right, rtol=1e-9, atol=0.0)


def test_the_mean_over_all_signs_is_the_trace_and_its_error_is_the_stated_one():
    size = 8
    matrix, least = matrix_of(size, decades=1.5)
    bits = (torch.arange(2**size).unsqueeze(1) >> torch.arange(size)) & 1
    every = 2.0 * bits.double() - 1.0
    recurrences = run(matrix, every, size)
    right = function_of(matrix, torch.log)
    estimate = recurrences.trace(torch.log, least)
    assert estimate.value == pytest.approx(right.diagonal().sum().item(), rel=1e-10)
    one_vector = 2.0 * (right.square().sum() - right.diagonal().square().sum())
    found_variance = estimate.stderr**2 * len(every)
    assert found_variance == pytest.approx(one_vector.item() * len(every) / (len(every) - 1), rel=1e-9)


def test_the_stated_error_of_few_vectors_is_right_on_average():
    matrix, least = matrix_of(40, decades=1.0)
    right = function_of(matrix, torch.log)
    variance = 2.0 * (right.square().sum() - right.diagonal().square().sum()).item() / 3
    stated = [
        run(matrix, random_signs(3, matrix[0], seed), 25).trace(torch.log, least).stderr ** 2
        for seed in range(60)
    ]
    mean = sum(stated) / len(stated)
    assert mean == pytest.approx(variance, rel=0.1)
    assert (
        max(stated) < 1.6 * variance
    )  # that of the three sums alone would be many times too small and too large


@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0.1, 5.0))
def test_more_steps_narrow_the_gap(seed, num_vectors, decades):
    matrix, least = matrix_of(15, seed=seed, decades=decades)
    recurrences = LanczosRecurrences(
        lambda vectors: vectors @ matrix, random_signs(num_vectors, matrix[0], seed)
    )
    gaps = []
    for _ in range(8):
        recurrences.extend()
        gaps.append(recurrences.trace(torch.log, least).gap)
    for before, after in zip(gaps, gaps[1:], strict=False):
        assert after <= before * (1.0 + 1e-6) + 1e-9


def test_float32_bases_stay_orthogonal():
    matrix, least = matrix_of(60, decades=4.0)
    starts = random_signs(2, matrix[0].float())
    recurrences = run(matrix.float(), starts, 60)
    right = ((starts.double() @ function_of(matrix, torch.log)) * starts.double()).sum(1)
    torch.testing.assert_close(recurrences.gauss(torch.log), right, rtol=1e-3, atol=1e-3)
    assert recurrences.trace(torch.log, least).gap < 0.05


def test_one_vector_states_an_upper_bound_of_its_error():
    matrix, least = matrix_of(20)
    right = function_of(matrix, torch.log)
    stated = run(matrix, random_signs(1, matrix[0]), 20).trace(torch.log, least).stderr ** 2
    assert stated >= 2.0 * (right.square().sum() - right.diagonal().square().sum()).item() * 0.5


def test_one_seed_gives_the_same_signs_in_every_type():
    like = torch.zeros(50)
    torch.testing.assert_close(random_signs(3, like, 7).double(), random_signs(3, like.double(), 7))
    assert set(random_signs(3, like, 7).flatten().tolist()) == {-1.0, 1.0}

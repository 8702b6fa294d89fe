"""Traces of functions by stochastic Lanczos quadrature, held against dense eigenvalues."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bayes.numerics.lanczos_quadrature import (
    LanczosRecurrences,
    SampledTrace,
    converge,
    random_signs,
)

FEW = settings(settings.get_profile("default"), max_examples=20)


def matrix_of(size, *, seed=0, decades=3.0):
    """A symmetric matrix [size, size] with eigenvalues from 1 to 10**decades, and their smallest."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = 10.0 ** (decades * torch.rand(size, generator=generator, dtype=torch.float64))
    return (basis * values) @ basis.mT, values.min().item()


def function_of(matrix, function):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * function(values)) @ vectors.mT


def variance_of_one(matrix):
    """Of zᵀAz for a vector z of random signs."""
    return 2.0 * (matrix.square().sum() - matrix.diagonal().square().sum()).item()


def new(matrix, starts):
    return LanczosRecurrences(lambda vectors: vectors @ matrix, starts)


def run(matrix, starts, steps):
    recurrences = new(matrix, starts)
    for _ in range(steps):
        recurrences.extend()
    return recurrences


def trace_of(matrix, *groups):
    """The estimate of the trace of a dense matrix from groups of vectors."""
    trace = SampledTrace()
    for signs in groups:
        trace.add(signs, signs @ matrix)
    return trace


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(4))
def test_the_quadratic_form_lies_between_the_two_rules(steps, seed):
    matrix, least = matrix_of(30, seed=seed)
    starts = random_signs(range(3 * seed, 3 * seed + 3), matrix[0])
    recurrences = run(matrix, starts, steps)
    right = ((starts @ function_of(matrix, torch.log)) * starts).sum(1)
    slack = 1e-9 * right.abs().max()
    assert bool((recurrences.gauss(torch.log) >= right - slack).all())
    assert bool((recurrences.radau(torch.log, 0.5 * least) <= right + slack).all())
    middle, gaps = recurrences.between(torch.log, 0.5 * least)
    assert bool(((middle - right).abs() <= 0.5 * gaps + slack).all())


def test_as_many_steps_as_dimensions_are_exact():
    matrix, least = matrix_of(12)
    starts = random_signs(range(4), matrix[0])
    recurrences = run(matrix, starts, 12)
    whole = function_of(matrix, torch.log)
    right = ((starts @ whole) * starts).sum(1)
    torch.testing.assert_close(recurrences.gauss(torch.log), right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(recurrences.radau(torch.log, least), right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(recurrences.images(torch.log), starts @ whole, rtol=1e-9, atol=1e-9)
    inverse = function_of(matrix, torch.reciprocal)
    torch.testing.assert_close(recurrences.images(torch.reciprocal), starts @ inverse, rtol=1e-9, atol=1e-9)
    assert recurrences.exhausted


def test_a_vector_whose_space_ends_does_not_hold_up_the_others():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 2.0, 5.0, 7.0, 11.0], dtype=torch.float64))
    starts = torch.ones(2, 6, dtype=torch.float64)
    starts[0, 3:] = 0.0  # two distinct eigenvalues
    recurrences = run(matrix, starts, 6)
    right = (starts.square() * matrix.diagonal().log()).sum(1)
    torch.testing.assert_close(recurrences.gauss(torch.log), right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(recurrences.radau(torch.log, 0.5), right, rtol=1e-12, atol=1e-12)
    expected = starts * matrix.diagonal().log()
    torch.testing.assert_close(recurrences.images(torch.log), expected, rtol=1e-12, atol=1e-12)


def test_the_rules_are_exact_for_polynomials_of_their_degree():
    matrix, least = matrix_of(20, decades=1.0)
    starts = random_signs(range(2), matrix[0])
    recurrences = run(matrix, starts, 3)
    for degree, rule in [(5, recurrences.gauss), (6, lambda f: recurrences.radau(f, 0.9 * least))]:
        right = ((starts @ torch.linalg.matrix_power(matrix, degree)) * starts).sum(1)
        torch.testing.assert_close(rule(lambda x, d=degree: x**d), right, rtol=1e-9, atol=0.0)


def test_the_mean_over_all_signs_is_the_trace_and_its_error_is_the_stated_one():
    size = 6
    matrix, _ = matrix_of(size, decades=1.5)
    bits = (torch.arange(2**size).unsqueeze(1) >> torch.arange(size)) & 1
    every = 2.0 * bits.double() - 1.0
    right = function_of(matrix, torch.log)
    estimate = trace_of(right, every)
    assert estimate.mean == pytest.approx(right.diagonal().sum().item(), rel=1e-10)
    stated = estimate.stderr**2 * len(every)
    assert stated == pytest.approx(variance_of_one(right) * len(every) / (len(every) - 1), rel=1e-9)


def test_the_stated_error_of_few_vectors_is_right_on_average():
    right = function_of(matrix_of(40, decades=1.0)[0], torch.log)
    groups = random_signs(range(3 * 400), right[0]).split(3)
    stated = torch.tensor([trace_of(right, signs).stderr ** 2 for signs in groups])
    variance = variance_of_one(right) / 3
    assert stated.mean().item() == pytest.approx(variance, rel=0.05)
    # That of the three sums alone is many times too small and too large.
    assert stated.max().item() < 2.0 * variance
    sums = torch.stack([((signs @ right) * signs).sum(1).var() / 3 for signs in groups])
    assert sums.std() > 5.0 * stated.std()


def test_groups_of_vectors_add_up_to_one():
    right = function_of(matrix_of(20)[0], torch.log)
    signs = random_signs(range(9), right[0])
    whole, apart = trace_of(right, signs), trace_of(right, signs[:4], signs[4:5], signs[5:])
    assert apart.num_vectors == whole.num_vectors == 9
    for name in ("mean", "stderr"):
        assert getattr(apart, name) == pytest.approx(getattr(whole, name), rel=1e-9), name


@pytest.mark.parametrize(
    "kind",
    [
        "random",
        "rank one",
    ],
)
def test_degrees_of_freedom_are_those_that_the_error_has(kind):
    """By the spread of the stated variances over many groups: 2 mean²/variance of a multiple of χ²."""
    if kind == "random":
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(30, 30, generator=generator, dtype=torch.float64)
        matrix = matrix + matrix.mT
    else:
        matrix = torch.ones(30, 30, dtype=torch.float64)
    traces = [trace_of(matrix, signs) for signs in random_signs(range(6 * 300), matrix[0]).split(6)]
    variances = torch.tensor([trace.stderr**2 for trace in traces])
    right = (2.0 * variances.mean() ** 2 / variances.var()).item()
    stated = torch.tensor([trace.degrees_of_freedom for trace in traces]).median().item()
    assert right / 1.5 < stated < 1.5 * right


def test_the_error_of_a_diagonal_is_zero():
    signs = random_signs(range(4), torch.zeros(5, dtype=torch.float64))
    trace = trace_of(torch.eye(5, dtype=torch.float64), signs)
    assert (trace.mean, trace.stderr, trace.degrees_of_freedom) == (5.0, 0.0, math.inf)


@FEW
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0.1, 5.0))
def test_more_steps_narrow_the_gap(seed, num_vectors, decades):
    matrix, least = matrix_of(12, seed=seed, decades=decades)
    recurrences = new(matrix, random_signs(range(seed, seed + num_vectors), matrix[0]))
    gaps = []
    for _ in range(6):
        recurrences.extend()
        gaps.append(recurrences.between(torch.log, least)[1])
    for before, after in itertools.pairwise(gaps):
        assert bool((after <= before * (1.0 + 1e-6) + 1e-9).all())


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_steps_end_where_the_gap_is_a_share_of_the_error(share):
    matrix, least = matrix_of(60, decades=2.0)
    recurrences = new(matrix, random_signs(range(4), matrix[0]))
    watched = []
    middle, gap = converge(recurrences, torch.log, least, share, 60, lambda *seen: watched.append(seen))
    trace = SampledTrace()
    trace.add(recurrences.starts, recurrences.images(torch.log))
    assert gap <= share * trace.stderr
    assert [steps for steps, _ in watched] == list(range(2, len(watched) + 2))
    assert watched[-1] == (recurrences.num_steps, gap)
    right = ((recurrences.starts @ function_of(matrix, torch.log)) * recurrences.starts).sum(1)
    assert bool(((middle - right).abs() <= 2.0 * gap).all())
    few = new(matrix, recurrences.starts)
    assert converge(few, torch.log, least, 0.0, 3)[1] > gap
    assert few.num_steps == 3


def test_converging_ends_with_the_space():
    matrix, least = matrix_of(8)
    recurrences = new(matrix, random_signs(range(3), matrix[0]))
    middle, gap = converge(recurrences, torch.log, least, 0.0, 100)
    right = ((recurrences.starts @ function_of(matrix, torch.log)) * recurrences.starts).sum(1)
    torch.testing.assert_close(middle, right, rtol=1e-9, atol=1e-9)
    assert recurrences.num_steps <= 8 and gap < 1e-8


def test_float32_bases_stay_orthogonal():
    matrix, least = matrix_of(60, decades=4.0)
    starts = random_signs(range(2), matrix[0].float())
    recurrences = run(matrix.float(), starts, 60)
    right = ((starts.double() @ function_of(matrix, torch.log)) * starts.double()).sum(1)
    torch.testing.assert_close(recurrences.gauss(torch.log), right, rtol=1e-3, atol=1e-3)
    assert recurrences.between(torch.log, least)[1].max() < 0.05


def test_one_vector_states_an_upper_bound_of_its_error():
    right = function_of(matrix_of(20)[0], torch.log)
    stated = [trace_of(right, signs).stderr ** 2 for signs in random_signs(range(50), right[0]).split(1)]
    assert sum(stated) / 50 >= variance_of_one(right)


def test_one_number_gives_the_same_signs_in_every_type_and_company():
    like = torch.zeros(50)
    torch.testing.assert_close(random_signs([7, 8, 9], like).double(), random_signs([7, 8, 9], like.double()))
    torch.testing.assert_close(random_signs([9], like), random_signs(range(7, 10), like)[2:])
    assert set(random_signs([7], like).flatten().tolist()) == {-1.0, 1.0}

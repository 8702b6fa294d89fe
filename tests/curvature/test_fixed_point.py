"""The λ at which λ‖ω‖² = γ, held against the eigenvalues it comes from."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from lightning_bayes.numerics.mackay_fixed_point import mackay_fixed_point

spectra = st.lists(st.floats(-6.0, 6.0), min_size=1, max_size=12)
END = math.log(1e12)


@given(spectra, st.floats(-4.0, 4.0), st.floats(-10.0, 10.0))
def test_it_is_the_maximum_in_a_few_steps(exponents, log_norm, start):
    eigenvalues, norm = [10.0**e for e in exponents], 10.0**log_norm
    tried = []

    def gamma(x):
        tried.append(x)
        return sum(e / (e + math.exp(x)) for e in eigenvalues)

    def log_evidence(x):
        return -0.5 * (norm * math.exp(x) + sum(math.log1p(e / math.exp(x)) for e in eigenvalues))

    found = mackay_fixed_point(gamma, norm, start, -END, END)
    steps = len(tried)
    literal = brentq(lambda x: gamma(x) - norm * math.exp(x), -3 * END, 3 * END, xtol=1e-13)
    assert log_evidence(found) == pytest.approx(log_evidence(literal), abs=2e-6, rel=1e-12)
    assert steps <= 12


def test_from_near_it_takes_two_or_three():
    eigenvalues = [0.1 * k**2 for k in range(1, 300)]
    tried = []

    def gamma(x):
        tried.append(x)
        return sum(e / (e + math.exp(x)) for e in eigenvalues)

    far = mackay_fixed_point(gamma, 3.0, math.log(1e4), -END, END)
    assert len(tried) <= 6
    tried.clear()
    near = mackay_fixed_point(gamma, 3.0, far + 0.1, -END, END)
    assert len(tried) <= 3
    assert near == pytest.approx(far, abs=1e-3)


def test_ends():
    assert mackay_fixed_point(lambda x: 0.0, 1.0, 0.0, -5.0, 5.0) == -5.0
    assert mackay_fixed_point(lambda x: 1.0, math.exp(-20.0), 0.0, -5.0, 5.0) == 5.0
    assert mackay_fixed_point(lambda x: 1e-3, math.exp(20.0), 0.0, -5.0, 5.0) == -5.0


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-6])
def test_curvature_that_the_start_does_not_see_has_its_maximum_all_the_same(size):
    """Twenty weights of norm 1 begin at λ = 20, where γ = 20 · 1e-9 / 20 is taken for nothing."""
    low = math.log(20.0) - math.log(1e8)

    def gamma(x):
        return 20.0 * size / (size + math.exp(x))

    found = mackay_fixed_point(gamma, 1.0, math.log(20.0), low, -low)
    literal = brentq(lambda x: gamma(x) - math.exp(x), low, -low, xtol=1e-13)
    assert low + 1.0 < literal
    assert found == pytest.approx(literal, abs=0.2)  # where 1e-6 nats are accepted

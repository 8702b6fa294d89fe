"""Statistics of curves over L2, on curves whose answer is known."""

import numpy as np
import pytest

from examples.smith_le_2018.intervals import (
    best_place,
    bootstrap,
    chosen_cost,
    mean_interval,
    optima_agree,
    rank_correlation,
    student_interval,
    within,
)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_bootstrap_of_a_mean_is_students_interval(seeds):
    """However few the seeds are: their percentiles would cover 50 % for two and 84 % for five."""
    values = np.random.default_rng(seeds).standard_normal(seeds)
    estimate, *ends = bootstrap(lambda draw: values[draw].mean(), seeds)
    mean, *expected = mean_interval(values)
    assert estimate == pytest.approx(mean)
    # 2,000 resamples: a standard error to 2 %.
    assert np.array(ends) - mean == pytest.approx(np.array(expected) - mean, rel=0.06)


def test_bootstrap_covers_a_statistic_that_is_not_linear():
    """The logarithm of a mean, 95 of 100 times, to within four standard errors of a count."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        values = generator.uniform(0.5, 1.5, 5)
        _, low, high = bootstrap(lambda draw, values=values: float(np.log(values[draw].mean())), 5)
        covered += low <= 0 <= high
    assert covered >= 95 - 4 * np.sqrt(100 * 0.95 * 0.05)


def test_bootstrap_stays_where_the_statistic_can_be():
    _, low, high = bootstrap(lambda draw: float(np.mean(draw)) / 10 + 0.9, 3, most=1.0)
    assert low < 0.9 and high == 1.0


def test_an_error_that_seeds_do_not_reduce_widens_the_interval():
    low, high = student_interval(2.0, np.full(100, 2.0), 5, variance=0.25)
    assert (low, high) == pytest.approx((2 - 1.96 * 0.5, 2 + 1.96 * 0.5), abs=1e-3)


def test_bootstrap_of_one_seed_knows_nothing():
    assert bootstrap(lambda draw: float(draw.sum()), 1) == (0.0, -np.inf, np.inf)


def test_bootstrap_of_equal_seeds_is_a_point():
    assert bootstrap(lambda draw: 3.0, 5) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize("centre", [-1.3, 0.0, 0.4, 2.2])
def test_best_place_of_a_parabola_in_log_x_is_its_vertex(centre):
    x = np.logspace(-3, 4, 8)
    assert best_place(x, (np.log10(x) - centre) ** 2) == pytest.approx(centre, abs=1e-9)


@pytest.mark.parametrize(("values", "expected"), [([1, 2, 3], -1.0), ([3, 2, 1], 1.0), ([2, 1, 2], 0.0)])
def test_best_place_at_an_edge_is_the_edge(values, expected):
    assert best_place(np.array([0.1, 1, 10]), np.array(values, dtype=float)) == pytest.approx(expected)


def test_rank_correlation_is_of_order_alone():
    x = np.array([1.0, 2.0, 5.0, 9.0])
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1)


def test_chosen_cost_is_what_a_choice_loses_seed_by_seed():
    cost = np.array([[3.0, 1.0, 2.0], [5.0, 4.0, 7.0]])
    assert chosen_cost(cost, cost).tolist() == [0, 0]
    assert chosen_cost(np.array([[1.0, 2.0, 0.0], [2.0, 2.0, 1.0]]), cost).tolist() == [1, 3]


def test_optima_at_one_end_do_not_agree():
    inside, first, last = np.array([2.0, 1.0, 3.0]), np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    assert optima_agree(0.5, -0.1, 0.1, inside, inside) == "holds"
    for other in (first, last):
        assert optima_agree(0.5, 0.0, 0.0, other, other).startswith("not resolved")
        assert optima_agree(0.5, 0.1, 0.2, inside, other).startswith("not resolved")
    # Farther apart than allowed is what they are, wherever the end was.
    assert optima_agree(0.5, 1.0, 2.0, inside, last) == "does not hold"


def test_within():
    assert within(0.1, -0.05, 0.05) == "holds"
    assert within(0.1, 0.95, 1.05, centre=1.0) == "holds"
    assert within(0.1, 0.05, 0.2) == "not resolved"
    assert within(0.1, 0.15, 0.2) == "does not hold"

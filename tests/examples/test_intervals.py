"""Statistics of curves over L2, on curves whose answer is known."""

import numpy as np
import pytest

from examples.smith_le_2018.intervals import best_place, bootstrap, chosen_cost, rank_correlation, within


def test_bootstrap_covers_the_mean_of_normal_numbers():
    """A percentile bootstrap of 20 numbers is a little narrow: about 93 % rather than 95 %."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        values = generator.standard_normal(20)
        estimate, low, high = bootstrap(lambda draw, values=values: values[draw].mean(), 20)
        assert estimate == pytest.approx(values.mean())
        covered += low <= 0 <= high
    assert 85 <= covered <= 99


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


def test_within():
    assert within(0.1, -0.05, 0.05) == "holds"
    assert within(0.1, 0.95, 1.05, centre=1.0) == "holds"
    assert within(0.1, 0.05, 0.2) == "not resolved"
    assert within(0.1, 0.15, 0.2) == "does not hold"

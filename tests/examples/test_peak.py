"""Estimates of the best batch size, against curves whose peak is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.smith_le_2018.collapse import explained
from examples.smith_le_2018.peak import (
    best_batch_size,
    best_batch_sizes,
    mean_interval,
    peak_ratio,
    power_law,
    student_interval,
)

GRID = [8, 12, 16, 24, 32, 48, 64, 128]


def accuracies(batch_sizes, best, *, noise=0.0, seeds=5, seed=0, least=0.09):
    """Small batches do not train, large ones generalise a little less; with independent noise."""
    v = 1.5 * (np.log2(batch_sizes) - np.log2(best))
    error = least * np.exp(0.1 * (np.exp(-v) - 1 + v))
    return 1 - error + noise * np.random.default_rng(seed).normal(size=(seeds, len(error)))


def parabola(batch_sizes, best):
    return 0.9 - 0.01 * (np.log2(batch_sizes) - np.log2(best))[None] ** 2


@given(st.floats(13, 60))
def test_peak_of_the_shape_that_is_fitted_is_exact(best):
    assert best_batch_size(GRID, accuracies(GRID, best)) == pytest.approx(best, rel=1e-4)


@given(st.floats(16, 48))
def test_peak_of_another_shape_is_near(best):
    """Within a sixth of an octave of a parabola's: less than the grid's spacing."""
    assert best_batch_size(GRID, parabola(GRID, best)) == pytest.approx(best, rel=0.12)


@given(st.floats(0.8, 1.25), st.floats(0.5, 2.0))
def test_curves_of_one_shape_move_together_whatever_their_height(ratio, height):
    """A shift of all curves, of whatever shape, is found: it is what the slopes are made of."""
    first = [round(40 * size) for size in GRID]
    second = [round(40 * ratio * size) for size in GRID]
    both = [(first, parabola(first, 1000.0)), (second, 1 - height * (1 - parabola(second, 1000.0 * ratio)))]
    one, other = best_batch_sizes(both)
    assert other / one == pytest.approx(ratio, rel=0.01)


def test_batches_that_do_not_train_do_not_move_the_peak():
    found = accuracies(GRID, 24.0)
    found[:, :2] = 0.1
    assert best_batch_size(GRID, found) == pytest.approx(24.0, rel=1e-4)


def test_peak_never_leaves_the_grid():
    rising = np.linspace(0.8, 0.9, len(GRID))[None]
    assert GRID[-2] <= best_batch_size(GRID, rising) <= GRID[-1]
    assert GRID[0] <= best_batch_size(GRID, rising[:, ::-1]) <= GRID[2]


def test_interval_of_five_seeds_holds_the_truth_as_often_as_it_says():
    """For a mean it is Student's; percentiles of the resamples hold the truth in five cases of six."""
    generator = np.random.default_rng(0)
    draws = generator.integers(5, size=(2000, 5))
    held = plain = 0
    for _ in range(400):
        values = generator.normal(size=5)
        means = values[draws].mean(1)
        low, high = student_interval(values.mean(), means, 5)
        assert (low, high) == pytest.approx(mean_interval(values)[1:], abs=0.1 * (high - low))
        held += low < 0 < high
        plain += np.quantile(means, 0.025) < 0 < np.quantile(means, 0.975)
    assert plain < 0.88 * 400
    assert 0.92 * 400 < held < 0.98 * 400


@settings(max_examples=10)
@given(st.floats(0.3, 1.5))
def test_exponent_is_found(exponent):
    x = [1.0, 2.0, 4.0, 8.0]
    grids = []
    for value in x:
        sizes = [round(size * value**exponent) for size in (800, 1200, 1600, 2400, 3200, 4800, 6400)]
        grids.append((sizes, accuracies(sizes, 2000 * value**exponent)))
    law = power_law(x, grids)
    assert law.slope == pytest.approx(exponent, abs=1e-3)
    assert law.low == pytest.approx(law.high, abs=1e-4)  # all seeds say the same
    assert law.at(np.array(x)) == pytest.approx(law.best)


def test_interval_widens_with_the_noise_and_holds_the_truth():
    x = [1.0, 2.0, 4.0]

    def law(noise):
        sizes = [[round(size * value) for size in GRID] for value in x]
        found = [accuracies(s, 24 * v, noise=noise, seed=int(v)) for s, v in zip(sizes, x, strict=True)]
        return power_law(x, list(zip(sizes, found, strict=True)))

    quiet, loud = law(0.001), law(0.004)
    assert quiet.low < 1 < quiet.high
    assert loud.high - loud.low > 2 * (quiet.high - quiet.low)


def test_ratio_of_two_peaks():
    ratio, low, high = peak_ratio((GRID, accuracies(GRID, 40.0)), (GRID, accuracies(GRID, 20.0)))
    assert (ratio, low, high) == pytest.approx((2.0, 2.0, 2.0), rel=1e-3)


def test_one_seed_has_no_interval():
    law = power_law([1.0, 2.0], [(GRID, accuracies(GRID, best, seeds=1)) for best in (20.0, 40.0)])
    assert law.slope == pytest.approx(1.0, abs=0.05)
    assert (law.low, law.high) == (-np.inf, np.inf)


def test_mean_interval_is_students():
    # t with 4 degrees of freedom: 2.776; the standard error of 1..5 is sqrt(2.5/5).
    mean, low, high = mean_interval(np.arange(1.0, 6.0))
    assert (mean, low, high) == pytest.approx((3.0, 3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5), abs=1e-3)
    assert mean_interval(np.array([0.5])) == (0.5, -np.inf, np.inf)
    assert mean_interval(np.array([1.0, 1.0])) == (1.0, 1.0, 1.0)


def test_what_a_function_of_x_explains():
    generator = np.random.default_rng(0)
    x = 2 ** generator.uniform(0, 8, 200)
    assert explained(x, -np.floor(np.log2(x))) == pytest.approx(1.0)
    assert abs(explained(x, generator.normal(size=200))) < 0.1

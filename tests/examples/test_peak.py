"""Estimates of the best batch size, against curves whose peak is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.smith_le_2018.collapse import explained
from examples.smith_le_2018.intervals import mean_interval
from examples.smith_le_2018.peak import best_batch_size, peak_ratio, power_law

GRID = [8, 12, 16, 24, 32, 48, 64, 128]


def accuracies(batch_sizes, best, *, noise=0.0, seeds=5, seed=0):
    """Test error a parabola in log2 B, with independent noise."""
    error = 0.1 + 0.01 * (np.log2(batch_sizes) - np.log2(best)) ** 2
    return 1 - error + noise * np.random.default_rng(seed).normal(size=(seeds, len(error)))


@given(st.floats(13, 60))
def test_peak_of_a_parabola_is_exact(best):
    assert best_batch_size(GRID, accuracies(GRID, best)) == pytest.approx(best, rel=1e-6)


def test_batches_that_do_not_train_do_not_move_the_peak():
    found = accuracies(GRID, 24.0)
    found[:, :2] = 0.1
    assert best_batch_size(GRID, found) == pytest.approx(24.0, rel=1e-6)


def test_peak_never_leaves_the_grid():
    rising = np.linspace(0.8, 0.9, len(GRID))[None]
    assert GRID[-2] <= best_batch_size(GRID, rising) <= GRID[-1]
    assert GRID[0] <= best_batch_size(GRID, rising[:, ::-1]) <= GRID[2]


@settings(max_examples=10)
@given(st.floats(0.3, 1.5))
def test_exponent_is_found(exponent):
    x = [1.0, 2.0, 4.0, 8.0]
    grids = []
    for value in x:
        sizes = [round(size * value**exponent) for size in (800, 1200, 1600, 2400, 3200, 4800, 6400)]
        grids.append((sizes, accuracies(sizes, 2000 * value**exponent)))
    law = power_law(x, grids)
    assert law.slope == pytest.approx(exponent, abs=1e-6)
    assert law.low == pytest.approx(law.high, abs=1e-6)  # all seeds say the same
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


def cliff(batch_sizes, best, seeds=5):
    """Test error that falls steeply to the best batch size and rises slowly after it, the same for all seeds."""
    octaves = np.log2(batch_sizes) - np.log2(best)
    error = 0.1 + np.where(octaves < 0, -0.5 * octaves, 0.01 * octaves)
    return np.tile(1 - error, (seeds, 1))


def test_a_peak_that_is_not_inside_its_points_is_known_to_the_grid():
    """All seeds agree, and grids that move in proportion would give a slope of exactly 1."""
    x = [1.0, 2.0, 4.0, 8.0]
    grids = []
    for value in x:
        sizes = [round(size * value) for size in (800, 1131, 1600, 2263, 3200)]
        grids.append((sizes, cliff(sizes, 1599 * value**0.98)))
    law = power_law(x, grids)
    assert law.slope == pytest.approx(1.0, abs=1e-3)
    assert law.low < 0.98 and law.high > 1.0
    # Half an octave apart: a uniform error of a quarter of an octave either way.
    reach = 1.96 * np.log(2) / 2 / np.sqrt(12)
    assert np.log(law.best_high / law.best) == pytest.approx(reach, rel=0.01)
    ratio, low, high = peak_ratio(*grids[:2])
    assert (
        np.log(high / ratio) == pytest.approx(np.log(ratio / low)) == pytest.approx(2**0.5 * reach, rel=0.01)
    )


def test_ratio_of_two_peaks():
    ratio, low, high = peak_ratio((GRID, accuracies(GRID, 40.0)), (GRID, accuracies(GRID, 20.0)))
    assert (ratio, low, high) == pytest.approx((2.0, 2.0, 2.0), rel=1e-6)


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

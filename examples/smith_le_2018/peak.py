"""Where accuracy peaks over a grid of batch sizes, and how that place moves: with intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial
from scipy import stats

__all__ = ["PowerLaw", "best_batch_size", "mean_interval", "peak_ratio", "power_law", "resampled_interval"]

Grid = tuple[Sequence[int], np.ndarray]
"""Batch sizes [b] and the test accuracies that they reach, [seeds, b]."""

RESAMPLES = 2000
TOP = 1.25
"""The peak is fitted to batch sizes whose test error is at most so many times the least one's..."""
OCTAVES = 1.01
"""... and that are at most an octave from the best of the grid."""


@dataclass(frozen=True)
class PowerLaw:
    """Best batch size against x: log B = intercept + slope · log x, intervals by bootstrap over seeds."""

    slope: float
    low: float
    high: float
    intercept: float
    best: np.ndarray
    best_low: np.ndarray
    best_high: np.ndarray

    def at(self, x: np.ndarray) -> np.ndarray:
        """The fitted line, in batch sizes."""
        return np.exp(self.intercept) * x**self.slope


def best_batch_size(batch_sizes: Sequence[int], accuracies: np.ndarray) -> float:
    """Where mean test accuracy peaks: the vertex of a parabola in log B through the top of the peak.

    Args:
        batch_sizes: [b], ascending.
        accuracies: [seeds, b], test accuracies.

    Returns:
        B, not rounded, within the points fitted to; the best batch size of the grid itself where they are fewer than
        three or bend the wrong way.
    """
    x, error = np.log2(batch_sizes), 1 - accuracies.mean(0)
    top = error.argmin()
    near = (np.abs(x - x[top]) <= OCTAVES) & (error <= TOP * error[top])
    if near.sum() < 3:
        return float(batch_sizes[top])
    _, linear, square = Polynomial.fit(x[near], error[near], 2).convert().coef
    if square <= 0:
        return float(batch_sizes[top])
    return float(2 ** np.clip(-linear / (2 * square), x[near].min(), x[near].max()))


def power_law(x: Sequence[float], grids: Sequence[Grid]) -> PowerLaw:
    """The exponent with which the best batch size follows x.

    Args:
        x: [k], for instance learning rates.
        grids: for each x its batch sizes [b] and accuracies [seeds, b].

    Returns:
        The slope of log B against log x, with a 95 % bootstrap interval.
    """
    log_x = np.log(np.asarray(x, dtype=float))
    log_best = _resampled_log_best(grids)
    lines = np.polyfit(log_x, log_best.T, 1).T  # [1 + resamples, (slope, intercept)]
    low, high = resampled_interval(lines[1:, 0], len(grids[0][1]))
    best_low, best_high = np.exp(np.quantile(log_best[1:], [0.025, 0.975], axis=0))
    slope, intercept = map(float, lines[0])
    return PowerLaw(slope, low, high, intercept, np.exp(log_best[0]), best_low, best_high)


def peak_ratio(numerator: Grid, denominator: Grid) -> tuple[float, float, float]:
    """One best batch size in units of another, and its 95 % bootstrap interval.

    Args:
        numerator: batch sizes [b] and accuracies [seeds, b].
        denominator: likewise, of the same seeds.

    Returns:
        (ratio, low, high).
    """
    log_best = _resampled_log_best([numerator, denominator])
    ratios = np.exp(log_best[:, 0] - log_best[:, 1])
    return float(ratios[0]), *resampled_interval(ratios[1:], len(numerator[1]))


def resampled_interval(values: np.ndarray, seeds: int) -> tuple[float, float]:
    """The 95 % interval of a bootstrap over seeds.

    Args:
        values: [resamples].
        seeds: how many were resampled.

    Returns:
        (low, high); infinite for a single seed, which says nothing of others.
    """
    if seeds < 2:
        return -np.inf, np.inf
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _resampled_log_best(grids: Sequence[Grid]) -> np.ndarray:
    """Logarithms of the best batch sizes, [1 + resamples, grids]; the first row is of the seeds as they are.

    Seeds are resampled together for all grids, since one seed is one training set and one initialisation.
    """
    seeds = len(grids[0][1])
    generator = np.random.default_rng(0)
    draws = [np.arange(seeds), *np.sort(generator.integers(seeds, size=(RESAMPLES, seeds)))]
    # Few seeds have few distinct resamples (126 of five): each is fitted once.
    distinct, which = np.unique(draws, axis=0, return_inverse=True)
    log_best = np.log([[best_batch_size(sizes, found[draw]) for sizes, found in grids] for draw in distinct])
    return log_best[which.reshape(-1)]


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of a few repeats, and its 95 % interval by Student's t.

    Args:
        values: [seeds].

    Returns:
        (mean, low, high); an infinite interval for a single value, none for values that are all the same.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -np.inf, np.inf
    if np.ptp(values) == 0:  # for instance an accuracy of 1 in every repeat, of which scipy would warn
        return mean, mean, mean
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return mean, float(interval.low), float(interval.high)

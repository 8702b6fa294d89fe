"""Where accuracy peaks over a grid of batch sizes, and how that place moves: with intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import least_squares

__all__ = [
    "PowerLaw",
    "best_batch_size",
    "best_batch_sizes",
    "mean_interval",
    "peak_ratio",
    "power_law",
    "student_interval",
]

Grid = tuple[Sequence[int], np.ndarray]
"""Batch sizes [b] and the test accuracies that they reach, [seeds, b]."""

RESAMPLES = 4000
TRAINED = 4.0
"""The peak is fitted to batch sizes whose test error is at most so many times the least one's: the others did not
train."""
STEEPNESS = (0.2, 8.0)
"""Between which the fitted β lies."""


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


def best_batch_sizes(grids: Sequence[Grid]) -> np.ndarray:
    """Where mean test accuracy peaks, for each of some curves that are taken to have one shape.

    ln(test error) = c_k + A (exp(−β v) − 1 + β v),    v = log2(B / B_k)

    falls exponentially towards the best batch size B_k, since small batches do not train, and rises linearly behind
    it; all curves share A and β. A parabola through the top of each, which such a curve does not have, follows the
    noise of two or three batch sizes.

    Args:
        grids: for each curve its batch sizes [b], ascending, and test accuracies [seeds, b].

    Returns:
        B_k, not rounded, within its grid.
    """
    curves = [_trained(*grid) for grid in grids]
    lowest = np.array([log_error.min() for _, log_error in curves])
    tops = np.array([x[log_error.argmin()] for x, log_error in curves])
    ends = np.array([(x[0], x[-1]) for x, _ in curves])
    number = len(curves)

    def misfit(values: np.ndarray) -> np.ndarray:
        height, steepness = np.exp(values[:2])
        places, levels = values[2 : 2 + number], values[2 + number :]
        parts = []
        for (x, log_error), place, level in zip(curves, places, levels, strict=True):
            v = steepness * (x - place)
            parts.append(level + height * (np.exp(-v) - 1 + v) - log_error)
        return np.concatenate(parts)

    free = np.full(number, np.inf)
    low = np.concatenate([[np.log(1e-6), np.log(STEEPNESS[0])], ends[:, 0], -free])
    high = np.concatenate([[np.log(1e3), np.log(STEEPNESS[1])], ends[:, 1], free])
    start = np.clip(np.concatenate([np.log([0.1, 1.5]), tops, lowest]), low, high)
    fit = least_squares(misfit, start, bounds=(low, high), xtol=1e-12, ftol=1e-12, gtol=1e-12)
    return np.asarray(2 ** fit.x[2 : 2 + number])


def best_batch_size(batch_sizes: Sequence[int], accuracies: np.ndarray) -> float:
    """`best_batch_sizes` of a single curve."""
    return float(best_batch_sizes([(batch_sizes, accuracies)])[0])


def _trained(batch_sizes: Sequence[int], accuracies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log2 B and ln(test error) from the first to the last batch size that trained, neighbours of the best kept."""
    error = 1 - accuracies.mean(0)
    best = int(error.argmin())
    near = np.flatnonzero(error <= TRAINED * error[best])
    first, last = max(0, min(near[0], best - 1)), min(len(error) - 1, max(near[-1], best + 1))
    kept = slice(first, last + 1)
    return np.log2(batch_sizes)[kept], np.log(error[kept])


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
    slope, intercept = map(float, lines[0])
    seeds = len(grids[0][1])
    low, high = student_interval(slope, lines[1:, 0], seeds)
    ends = [student_interval(one[0], one[1:], seeds) for one in log_best.T]
    best_low, best_high = np.exp(np.array(ends).T)
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
    ratios = log_best[:, 0] - log_best[:, 1]
    low, high = student_interval(ratios[0], ratios[1:], len(numerator[1]))
    return float(np.exp(ratios[0])), float(np.exp(low)), float(np.exp(high))


def student_interval(estimate: float, resampled: np.ndarray, seeds: int) -> tuple[float, float]:
    """The 95 % interval of a smooth statistic whose standard error is taken from a bootstrap over seeds.

    estimate ∓ t · sd(resampled) · √(n / (n − 1)), with t Student's at 97.5 % and n − 1 degrees of freedom: for a mean
    it is Student's interval. The resamples' own quantiles hold the mean of five seeds in five cases of six, not in 95
    of 100.

    Args:
        estimate: of the seeds as they are.
        resampled: [resamples].
        seeds: n, how many were resampled.

    Returns:
        (low, high); infinite for a single seed, which says nothing of others.
    """
    if seeds < 2:
        return -np.inf, np.inf
    reach = stats.t.ppf(0.975, seeds - 1) * resampled.std() * np.sqrt(seeds / (seeds - 1))
    return float(estimate - reach), float(estimate + reach)


def _resampled_log_best(grids: Sequence[Grid]) -> np.ndarray:
    """Logarithms of the best batch sizes, [1 + resamples, grids]; the first row is of the seeds as they are.

    Seeds are resampled together for all grids, since one seed is one training set and one initialisation.
    """
    seeds = len(grids[0][1])
    generator = np.random.default_rng(0)
    draws = [np.arange(seeds), *np.sort(generator.integers(seeds, size=(RESAMPLES, seeds)))]
    # Few seeds have few distinct resamples (126 of five): each is fitted once.
    distinct, which = np.unique(draws, axis=0, return_inverse=True)
    log_best = np.log(
        [best_batch_sizes([(sizes, found[draw]) for sizes, found in grids]) for draw in distinct]
    )
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

"""Numbers about curves over the strength of L2, with 95 % bootstrap intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.polynomial import Polynomial
from scipy import stats

__all__ = ["best_place", "bootstrap", "chosen_cost", "rank_correlation", "within"]

RESAMPLES = 2000


def bootstrap(statistic: Callable[[np.ndarray], float], seeds: int) -> tuple[float, float, float]:
    """A statistic of the mean over seeds, and its 95 % percentile interval when seeds are drawn anew.

    Args:
        statistic: indices of seeds [k] to a number.
        seeds: how many there are.

    Returns:
        (estimate, low, high); an infinite interval for a single seed.
    """
    estimate = float(statistic(np.arange(seeds)))
    if seeds < 2:
        return estimate, -np.inf, np.inf
    draws = np.sort(np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds)))
    # Few seeds have few distinct resamples (126 of five): each is computed once.
    distinct, which = np.unique(draws, axis=0, return_inverse=True)
    values = np.array([statistic(draw) for draw in distinct])[which.reshape(-1)]
    low, high = np.quantile(values, [0.025, 0.975])
    return estimate, float(low), float(high)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two curves, [k] each."""
    return float(stats.spearmanr(first, second).statistic)


def best_place(x: np.ndarray, values: np.ndarray) -> float:
    """Log10 of where a curve has its minimum: the vertex of the parabola through its lowest point and its neighbours.

    Args:
        x: [k], positive, ascending.
        values: [k].

    Returns:
        Log10 x of the vertex; of the lowest point itself where it is the first or the last.
    """
    log_x, lowest = np.log10(x), int(np.argmin(values))
    if lowest in (0, len(x) - 1):
        return float(log_x[lowest])
    near = slice(lowest - 1, lowest + 2)
    _, linear, square = Polynomial.fit(log_x[near], values[near], 2).convert().coef
    if square <= 0:
        return float(log_x[lowest])
    return float(np.clip(-linear / (2 * square), log_x[near][0], log_x[near][-1]))


def chosen_cost(chooser: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """What it costs, seed by seed, to take the x at which another curve is lowest.

    Args:
        chooser: [seeds, k], the curves whose minimum is taken.
        cost: [seeds, k].

    Returns:
        [seeds], the cost there less the least of that seed.
    """
    taken = np.take_along_axis(cost, chooser.argmin(1)[:, None], 1)[:, 0]
    return taken - cost.min(1)


def within(allowed: float, low: float, high: float, centre: float = 0.0) -> str:
    """Verdict on a number that should be `centre` ± `allowed`."""
    if centre - allowed <= low and high <= centre + allowed:
        return "holds"
    return "does not hold" if low > centre + allowed or high < centre - allowed else "not resolved"

"""95 % intervals over seeds, numbers about curves over the strength of L2, and verdicts on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.polynomial import Polynomial
from scipy import stats

__all__ = [
    "at_an_end",
    "best_place",
    "bootstrap",
    "chosen_cost",
    "mean_interval",
    "optima_agree",
    "rank_correlation",
    "resampled",
    "student_interval",
    "within",
]

RESAMPLES = 2000


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


def resampled(statistic: Callable[[np.ndarray], float | Sequence[float]], seeds: int) -> np.ndarray:
    """A statistic of seeds that are drawn anew, with replacement.

    Args:
        statistic: indices of seeds [seeds] to a number, or to several [k].
        seeds: how many there are.

    Returns:
        [resamples] or [resamples, k].
    """
    draws = np.sort(np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds)))
    # Few seeds have few distinct resamples (126 of five): each is computed once.
    distinct, which = np.unique(draws, axis=0, return_inverse=True)
    return np.array([statistic(draw) for draw in distinct])[which.reshape(-1)]


def student_interval(
    estimate: float, values: np.ndarray, seeds: int, variance: float = 0.0
) -> tuple[float, float]:
    """The 95 % interval of a bootstrap over a few seeds: Student's t times the bootstrap's standard error.

        estimate ± √( t² · n/(n - 1) · Var(values) + z² · variance )

    Of a mean it is Student's own interval. The percentiles of a bootstrap are too near for few seeds: of five they
    cover a mean 83 times in 100, of two they are the two seeds, every other time.

    Args:
        estimate: of all seeds.
        values: [resamples].
        seeds: n.
        variance: of an error that more seeds would not reduce.

    Returns:
        (low, high); infinite for a single seed, which says nothing of others.
    """
    if seeds < 2:
        return -np.inf, np.inf
    by_seeds = stats.t.ppf(0.975, seeds - 1) ** 2 * seeds / (seeds - 1) * np.var(values)
    reach = float(np.sqrt(by_seeds + stats.norm.ppf(0.975) ** 2 * variance))
    return estimate - reach, estimate + reach


def bootstrap(
    statistic: Callable[[np.ndarray], float], seeds: int, most: float = np.inf
) -> tuple[float, float, float]:
    """A statistic of the mean over seeds, and its 95 % interval when seeds are drawn anew.

    Args:
        statistic: indices of seeds [k] to a number.
        seeds: how many there are.
        most: no such number is larger in size, for instance 1 of a correlation.

    Returns:
        (estimate, low, high); an infinite interval for a single seed.
    """
    estimate = float(statistic(np.arange(seeds)))
    if seeds < 2:
        return estimate, -np.inf, np.inf
    low, high = student_interval(estimate, resampled(statistic, seeds), seeds)
    return estimate, max(low, -most), min(high, most)


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


def at_an_end(values: np.ndarray) -> bool:
    """Whether a curve, [k], is lowest at one of its ends, so that its minimum may lie outside."""
    return int(np.argmin(values)) in (0, len(values) - 1)


def optima_agree(allowed: float, low: float, high: float, *curves: np.ndarray) -> str:
    """Verdict on the distance of two minima: two at the same end of the grid do not agree for that.

    Args:
        allowed: distance that counts as agreement.
        low: lower end of the interval of the distance.
        high: upper end.
        curves: [k] each, whose minima were compared.

    Returns:
        As `within`; "not resolved" for "holds" where a minimum is at an end. The distance of such a minimum from one
        inside can only be larger than measured, so that "does not hold" stands.
    """
    verdict = within(allowed, low, high)
    if verdict == "holds" and any(at_an_end(curve) for curve in curves):
        return "not resolved: an optimum is at the edge of the grid"
    return verdict


def within(allowed: float, low: float, high: float, centre: float = 0.0) -> str:
    """Verdict on a number that should be `centre` ± `allowed`."""
    if centre - allowed <= low and high <= centre + allowed:
        return "holds"
    return "does not hold" if low > centre + allowed or high < centre - allowed else "not resolved"

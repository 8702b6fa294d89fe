"""Where accuracy peaks over a grid of batch sizes, and how that place moves: with intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial

from examples.smith_le_2018.intervals import resampled, student_interval

__all__ = ["PowerLaw", "best_batch_size", "peak_ratio", "power_law"]

Grid = tuple[Sequence[int], np.ndarray]
"""Batch sizes [b] and the test accuracies that they reach, [seeds, b]."""

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
    best = np.exp(_log_peak(batch_sizes, accuracies)[0])
    return float(np.clip(best, batch_sizes[0], batch_sizes[-1]))  # logarithms round


def _log_peak(batch_sizes: Sequence[int], accuracies: np.ndarray) -> tuple[float, float]:
    """Log B of the peak, and the variance of it that is the grid's.

    Where no vertex lies between the points fitted to, as at the cliff below which batches do not train, the peak is
    known to half a place of the grid: a uniform error. The grids of figures 5 and 7 move as the claim predicts, so
    that without it such peaks would speak for the claim by themselves.
    """
    x, error = np.log(batch_sizes), 1 - accuracies.mean(0)
    top = int(error.argmin())
    near = (np.abs(x - x[top]) <= OCTAVES * np.log(2)) & (error <= TOP * error[top])
    at = float(x[top])
    if near.sum() >= 3:
        _, linear, square = Polynomial.fit(x[near], error[near], 2).convert().coef
        if square > 0:
            vertex = float(-linear / (2 * square))
            at = float(np.clip(vertex, x[near].min(), x[near].max()))
            if at == vertex:
                return at, 0.0
    place = int(np.abs(x - at).argmin())
    spacing = np.diff(x[max(place - 1, 0) : place + 2]).mean()
    return at, float(spacing**2 / 12)


def power_law(x: Sequence[float], grids: Sequence[Grid]) -> PowerLaw:
    """The exponent with which the best batch size follows x.

    Args:
        x: [k], for instance learning rates.
        grids: for each x its batch sizes [b] and accuracies [seeds, b].

    Returns:
        The slope of log B against log x, with a 95 % bootstrap interval.
    """
    log_x, seeds = np.log(np.asarray(x, dtype=float)), len(grids[0][1])
    # The slope is a weighted sum of the log B.
    weights = (log_x - log_x.mean()) / np.square(log_x - log_x.mean()).sum()
    log_best, again, grid = _log_peaks(grids)
    slope = float(weights @ log_best)
    low, high = student_interval(slope, again @ weights, seeds, float(weights**2 @ grid))
    ends = [
        student_interval(at, values, seeds, variance)
        for at, values, variance in zip(log_best, again.T, grid, strict=True)
    ]
    best_low, best_high = np.exp(np.array(ends).T)
    intercept = float(log_best.mean() - slope * log_x.mean())
    return PowerLaw(slope, low, high, intercept, np.exp(log_best), best_low, best_high)


def peak_ratio(numerator: Grid, denominator: Grid) -> tuple[float, float, float]:
    """One best batch size in units of another, and its 95 % bootstrap interval.

    Args:
        numerator: batch sizes [b] and accuracies [seeds, b].
        denominator: likewise, of the same seeds.

    Returns:
        (ratio, low, high).
    """
    log_best, again, grid = _log_peaks([numerator, denominator])
    log_ratio = float(log_best[0] - log_best[1])
    ends = student_interval(log_ratio, again[:, 0] - again[:, 1], len(numerator[1]), float(grid.sum()))
    low, high = np.exp(ends)
    return float(np.exp(log_ratio)), float(low), float(high)


def _log_peaks(grids: Sequence[Grid]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of the best batch sizes [k]; of resampled seeds [resamples, k]; and the variances of the grids [k].

    Seeds are resampled together for all grids, since one seed is one training set and one initialisation.
    """

    def peaks(draw: np.ndarray) -> list[tuple[float, float]]:
        return [_log_peak(sizes, found[draw]) for sizes, found in grids]

    seeds = len(grids[0][1])
    again = resampled(peaks, seeds)  # type: ignore[arg-type]  # [resamples, k, 2]
    return np.array(peaks(np.arange(seeds)))[:, 0], again[..., 0], again[..., 1].mean(0)

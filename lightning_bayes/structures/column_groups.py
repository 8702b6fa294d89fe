"""Sampled columns of the root: kept in a few groups apart, so that their spread tells the error.

The jackknife over the groups (Efron & Stein, *The Jackknife Estimate of Variance*, Annals of Statistics 1981)
also takes away the part of the bias that goes with 1/S: a log-determinant of a mean over S samples lies below
the log-determinant of the expectation.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_bayes.rows.rows import OuterRows, RowChunk, Rows
from lightning_bayes.structures.base import Problem

MAX_GROUPS = 8
"""Each group keeps factors of its own."""


class ColumnGroups:
    """Which group a column belongs to: all to one where nothing is sampled."""

    def __init__(self, problem: Problem) -> None:
        self._num_samples = problem.rank if problem.sampled else 1
        self.number = min(MAX_GROUPS, self._num_samples)

    def columns(self, chunk: RowChunk) -> list[list[int]]:
        """Columns of a chunk, counted from its first, for each group."""
        numbers = range(chunk.columns.start, chunk.columns.stop)
        return [
            [i for i, number in enumerate(numbers) if number % self.number == group]
            for group in range(self.number)
        ]

    def scale_without(self, group: int) -> float:
        """What makes the sum over all other groups an estimate of the whole."""
        size = len(range(group, self._num_samples, self.number))
        return self._num_samples / (self._num_samples - size)

    def jackknifed(
        self, log_det: float, gamma: float, without: Callable[[int, float], Iterable[Tensor]]
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Log-determinant and effective parameters, each corrected and with its standard error.

        Args:
            log_det: From all columns.
            gamma: The same.
            without: Whitened eigenvalues from all columns but one group's, times a scale.
        """
        left_out = []
        for group in range(self.number if self.number > 1 else 0):
            values = list(without(group, self.scale_without(group)))
            shrinkage = sum((value / (1 + value)).sum().item() for value in values)
            left_out.append((sum(torch.log1p(value).sum().item() for value in values), shrinkage))
        return jackknife(log_det, [one for one, _ in left_out]), jackknife(
            gamma, [one for _, one in left_out]
        )


def squares_by_group(layer: Rows, groups: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """Σ over rows of v², in the parameters' shapes, for each group of columns; empty for no columns."""
    if len(groups) == 1:
        return [layer.sum_squares()]
    if isinstance(layer, OuterRows):
        parts = [
            replace(layer, uses=tuple(replace(use, grads=use.grads[list(group)]) for use in layer.uses))
            for group in groups
        ]
        return [part.sum_squares() if group else {} for part, group in zip(parts, groups, strict=True)]
    sums_of_groups: list[dict[str, Tensor]] = [{} for _ in groups]
    owner = {column: sums for group, sums in zip(groups, sums_of_groups, strict=True) for column in group}
    for column, rows in enumerate(layer.columns()):
        squares = rows.square().sum(0).reshape(layer.shape)
        sums = owner[column]
        sums[layer.name] = sums[layer.name] + squares if layer.name in sums else squares
    return sums_of_groups


def jackknife(whole: float, left_out: Sequence[float]) -> tuple[float, float]:
    """Estimate without the 1/S part of its bias, and its standard error.

    θ̂ = G θ − (G − 1) mean θ₍₋g₎,  σ² = (G − 1)/G Σ (θ₍₋g₎ − mean)²

    Args:
        whole: θ from all samples.
        left_out: θ without each of the G groups; fewer than two tell nothing, and the error is infinite.
    """
    number = len(left_out)
    if number < 2:
        return whole, math.inf
    mean = sum(left_out) / number
    spread = sum((value - mean) ** 2 for value in left_out)
    return number * whole - (number - 1) * mean, math.sqrt((number - 1) / number * spread)

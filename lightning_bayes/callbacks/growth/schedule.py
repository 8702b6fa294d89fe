"""By how much the learning rate would have been divided: from milestones, or from the user's own schedulers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Literal, Protocol

from lightning_bayes.functional import BatchGrowth
from lightning_bayes.functional._validation import finite

Schedule = Iterable[int] | Mapping[int, float] | Literal["lr_scheduler"]
"""What `BatchSizeScheduler` takes."""
PAPERS_FACTOR = 5.0
"""Smith et al. divide the learning rate, or multiply the batch, by 5."""


class DecaySchedule(Protocol):
    """The decay κ of each epoch, and what is left of it for the learning rate.

    Attributes:
        peaks: the highest learning rate so far of each parameter group, where the decays are measured from it.
    """

    peaks: list[float]

    def observe(self, learning_rates: Sequence[float]) -> None:
        """Take learning rates into account that are no start of an epoch."""

    def decay(self, epoch: int, learning_rates: Sequence[float]) -> float:
        """κ of an epoch, given the learning rates that the optimizer's groups start it with."""

    def multiplier(self, growth: BatchGrowth) -> float:
        """The factor on the learning rates of the optimizer's groups when the batch has grown."""


class Milestones:
    """Decays that the user lists; no scheduler carries them out.

    Args:
        factors: pairs of an epoch, counted from 0, and the factor from then on.
    """

    def __init__(self, factors: Sequence[tuple[int, float]]) -> None:
        self.factors = tuple(sorted(factors))
        self.peaks: list[float] = []

    def observe(self, learning_rates: Sequence[float]) -> None:
        """Nothing: these decays depend on the epoch alone."""

    def decay(self, epoch: int, learning_rates: Sequence[float]) -> float:
        """The product of the factors of all milestones up to this epoch."""
        return math.prod((factor for milestone, factor in self.factors if milestone <= epoch), start=1.0)

    def multiplier(self, growth: BatchGrowth) -> float:
        """What the batch has left of the decay: nobody else decays the learning rate."""
        return growth.learning_rate_factor


class LearningRateDecay:
    """Decays that the learning rates of the optimizer show: how far each is below its highest so far."""

    def __init__(self) -> None:
        self.peaks: list[float] = []

    def observe(self, learning_rates: Sequence[float]) -> None:
        """Take learning rates into account, those of a warm-up for instance."""
        self.peaks += learning_rates[len(self.peaks) :]  # fine-tuning adds groups
        self.peaks = [max(pair) for pair in zip(self.peaks, learning_rates, strict=False)]

    def decay(self, epoch: int, learning_rates: Sequence[float]) -> float:
        """The smallest decay of a group, so that no group is taken beyond its peak; infinite where all are 0."""
        self.observe(learning_rates)
        known = [(peak, rate) for peak, rate in zip(self.peaks, learning_rates, strict=False) if peak > 0]
        return min((peak / rate if rate > 0 else math.inf for peak, rate in known), default=1.0)

    def multiplier(self, growth: BatchGrowth) -> float:
        """What takes back the scheduler's decay as far as the batch has it."""
        return growth.learning_rate_gain


def parse_schedule(schedule: object, factor: float | None) -> tuple[tuple[int, float], ...] | None:
    """The milestones and factors of a `BatchSizeScheduler`, None for those of the user's own schedulers.

    Args:
        schedule: epochs, a mapping from epoch to factor, or "lr_scheduler".
        factor: that of all epochs; None for the paper's 5.

    Raises:
        ValueError: for anything else, with what was got.
    """
    if isinstance(schedule, str) and schedule == "lr_scheduler":
        _no_factor(factor, '"lr_scheduler", whose decays are those of your own scheduler')
        return None
    if isinstance(schedule, Mapping):
        _no_factor(factor, "a mapping, which holds a factor for each epoch")
        return tuple(sorted((_epoch(epoch), _factor(value)) for epoch, value in schedule.items()))
    if isinstance(schedule, str) or not isinstance(schedule, Iterable):
        raise ValueError(
            "Expected argument `schedule` to be epochs such as [30, 60], a mapping from epoch to factor such as"
            ' {30: 5, 60: 2}, or "lr_scheduler" to take the decays of the scheduler that `configure_optimizers`'
            f" returns, but got {schedule!r}."
        )
    epochs = [_epoch(epoch) for epoch in schedule]
    if len(set(epochs)) < len(epochs):
        raise ValueError(f"Expected the epochs of argument `schedule` to differ, but got {epochs}.")
    value = _factor(PAPERS_FACTOR if factor is None else factor)
    return tuple(sorted((epoch, value) for epoch in epochs))


def _no_factor(factor: float | None, what: str) -> None:
    if factor is not None:
        raise ValueError(f"Expected no argument `factor` beside {what}, but got {factor!r}. Leave it out.")


def _epoch(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(
            "Expected the epochs of argument `schedule` to be whole numbers of at least 1 (the batch size of"
            f" epoch 0 is the one that you start with), but got {value!r}."
        )
    return int(value)


def _factor(value: object) -> float:
    requirement = "a number of at least 1, by which the batch is multiplied and the learning rate not divided"
    number = finite("factor", value, requirement)
    if number < 1:
        raise ValueError(f"Expected argument `factor` to be {requirement}, but got {value!r}.")
    return number

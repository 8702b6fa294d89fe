"""By how much the learning rate would have been divided, and the batches that are to be in its place.

The decays come from milestones, or from the user's own schedulers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from lightning_bayes.callbacks.trainer.settings import Sizes
from lightning_bayes.functional import BatchGrowth, grow_batch
from lightning_bayes.functional._validation import finite
from lightning_bayes.functional.batch_growth import GrowthMethod
from lightning_bayes.functional.scaling import Rule

Schedule = Iterable[int] | Mapping[int, float] | Literal["lr_scheduler"]
"""What `BatchSizeScheduler` takes."""
PAPERS_FACTOR = 5.0
"""Smith et al. divide the learning rate, or multiply the batch, by 5."""


class LearningRateDecay:
    """Decays κ that the learning rates of the optimizer show: how far each is below its highest so far.

    Attributes:
        peaks: the highest learning rate so far of each parameter group.
    """

    def __init__(self) -> None:
        self.peaks: list[float] = []

    def observe(self, learning_rates: Sequence[float]) -> None:
        """Take learning rates into account, those of a warm-up for instance."""
        self.peaks += learning_rates[len(self.peaks) :]  # fine-tuning adds groups
        self.peaks = [max(pair) for pair in zip(self.peaks, learning_rates, strict=False)]

    def decay(self, learning_rates: Sequence[float]) -> float:
        """The smallest decay of a group, so that no group is taken beyond its peak; infinite where all are 0."""
        self.observe(learning_rates)
        known = [(peak, rate) for peak, rate in zip(self.peaks, learning_rates, strict=False) if peak > 0]
        return min((peak / rate if rate > 0 else math.inf for peak, rate in known), default=1.0)


def decay_of(milestones: Iterable[tuple[int, float]], epoch: int) -> float:
    """The decay κ of an epoch, the product of the factors of all milestones up to it.

    Args:
        milestones: pairs of an epoch, counted from 0, and the factor from then on.
        epoch: counted from 0.
    """
    return math.prod((factor for milestone, factor in milestones if milestone <= epoch), start=1.0)


@dataclass
class BatchPlanner:
    """`grow_batch` for the Trainer at hand.

    Attributes:
        max_batch_size: as in `grow_batch`.
        max_device_batch_size: as in `grow_batch`.
        rule: as in `grow_batch`.
        start: at the first step, however often the run is resumed; None before it.
        start_batches: of an epoch then; infinite where that is not known.
        now: in this epoch.
    """

    max_batch_size: int | None
    max_device_batch_size: int | None
    rule: Rule
    start: Sizes | None = None
    start_batches: float = 0.0
    now: Sizes | None = None

    def plan(self, decay: float, method: GrowthMethod) -> BatchGrowth:
        """The batch for a decay, of loaders' batches as they are now ("accumulate") or of larger ones."""
        if self.start is None or self.now is None:
            raise RuntimeError("BatchSizeScheduler plans between `on_train_start` and `on_train_end` only.")
        device = (self.now if method == "accumulate" else self.start).device_batch_size
        return grow_batch(
            decay,
            device_batch_size=device,
            accumulation=self.start.accumulation,
            replicas=self.now.replicas,
            dataset_size=self.now.dataset_size,
            batch_size=self.start.batch_size,
            max_batch_size=self.max_batch_size,
            max_device_batch_size=self.max_device_batch_size,
            method=method,
            rule=self.rule,
        )

    def loads(self, growth: BatchGrowth) -> bool:
        """Whether the loader of this epoch has the batches that a growth is made of."""
        return self.now is not None and growth.device_batch_size == self.now.device_batch_size


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

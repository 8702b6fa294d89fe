"""Another learning rate while the optimizer steps, and the scheduler's own at all other times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepLearningRate:
    """Multiplies the learning rates of optimizers for the time of `step`.

    Most schedulers of torch compute a learning rate from the one before it, which they find in the optimizer. So
    the multiplied one must not be there when they look, whether or not the step was taken (a GradScaler skips
    some): torch's own hooks before and after `step` see to it. Clipping and the hooks of other callbacks before
    the optimizer's step, which Lightning runs inside `step`, see the learning rate that is used.

    Args:
        observe: called with the schedule's own learning rates before each step.

    Attributes:
        multiplier: the factor from now on; at 1 nothing is touched.
        used: the learning rates of the latest step, over all groups of all optimizers.
    """

    def __init__(self, observe: Callable[[Sequence[float]], None]) -> None:
        self._observe = observe
        self.multiplier = 1.0
        self.used: list[float] = []
        self._optimizers: Sequence[Optimizer] = ()
        self._handles: list[RemovableHandle] = []
        self._scheduled: list[tuple[dict[str, Any], float | Tensor]] = []

    def install(self, optimizers: Sequence[Optimizer]) -> None:
        """Put the hooks on."""
        self._optimizers = optimizers
        for optimizer in optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]

    def scheduled(self) -> list[float]:
        """The learning rates that the groups have now: outside `step` the schedule's own."""
        return [float(group["lr"]) for optimizer in self._optimizers for group in optimizer.param_groups]

    def in_step(self, group: Mapping[str, Any]) -> float:
        """The learning rate that a group has, or would have, in a step; asked for at any time."""
        return float(group["lr"]) * (1 if self._scheduled else self.multiplier)

    def remove(self) -> None:
        """Take the hooks away, and put back what a step that was interrupted has left."""
        self._put_back()
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], ()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._observe(self.scheduled())
        if self.multiplier != 1:
            self._scheduled = [(group, group["lr"]) for group in optimizer.param_groups]
            for group, rate in self._scheduled:
                group["lr"] = rate * self.multiplier
        self.used = self.scheduled()

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for group, rate in self._scheduled:
            group["lr"] = rate
        self._scheduled = []

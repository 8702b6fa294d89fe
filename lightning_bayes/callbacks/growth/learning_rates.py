"""What becomes of learning rates while the batch grows: other ones in steps, and schedules that are kept up."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_bayes.callbacks.growth.schedule import BatchPlanner
from lightning_bayes.functional.batch_growth import schedule_steps


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
                optimizer.register_step_post_hook(self._put_back),
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

    def _put_back(self, *arguments_of_hook: object) -> None:
        for group, rate in self._scheduled:
            group["lr"] = rate
        self._scheduled = []


class ScheduleSteps:
    """Keeps schedules with `interval="step"` where they would be had the batch not grown.

    A schedule that is to take `trainer.estimated_stepping_batches` steps takes as many, though the optimizer
    takes fewer.

    Attributes:
        taken: steps of each such schedule in this epoch, in the order of the Trainer's schedulers.
    """

    def __init__(self) -> None:
        self.taken: list[int] = []

    def after_batch(
        self, trainer: Trainer, module: LightningModule, batches: int, planner: BatchPlanner
    ) -> None:
        """Take the steps that are due; to be called after Lightning has stepped the schedules itself.

        Args:
            trainer: its schedulers are stepped by way of the module's `lr_scheduler_step`.
            module: the one in training.
            batches: those of this epoch that are over.
            planner: knows the sizes of this epoch, and of the start, whose pace is to be kept.
        """
        start, now = planner.start, planner.now
        if start is None or now is None:
            return
        over = (
            planner.start_batches
            if batches == trainer.num_training_batches
            else batches * now.device_batch_size // start.device_batch_size
        )
        configs = [
            config
            for config in trainer.lr_scheduler_configs
            if config.interval == "step" and not config.reduce_on_plateau
        ]
        self.taken += [0] * (len(configs) - len(self.taken))
        for index, config in enumerate(configs):
            due = schedule_steps(int(over), planner.start_batches, start.accumulation, config.frequency)
            own = (trainer.num_training_batches, trainer.accumulate_grad_batches, config.frequency)
            self.taken[index] += schedule_steps(batches, *own) - schedule_steps(batches - 1, *own)
            # torch warns of a schedule that steps before the optimizer ever has: what is due then, waits.
            while self.taken[index] < due and trainer.global_step > 0:
                module.lr_scheduler_step(config.scheduler, None)
                self.taken[index] += 1

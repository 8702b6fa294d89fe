"""Steps learning-rate schedules on behalf of the optimizer steps that a larger batch saves."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer

from lightning_bayes.functional.batch_growth import schedule_steps


@dataclass(frozen=True)
class Pace:
    """How an epoch is divided.

    Attributes:
        device_batch_size: examples of one batch of the loader.
        accumulation: batches per optimizer step.
        epoch_batches: batches of an epoch; infinite where that is not known.
    """

    device_batch_size: int
    accumulation: int
    epoch_batches: float


class ScheduleSteps:
    """Keeps schedules with `interval="step"` where they would be had the batch not grown.

    A schedule that is to take `trainer.estimated_stepping_batches` steps takes as many, though the optimizer
    takes fewer.

    Attributes:
        taken: steps of each such schedule in this epoch, in the order of the Trainer's schedulers.
    """

    def __init__(self) -> None:
        self.taken: list[int] = []

    def begin_epoch(self) -> None:
        """Count from 0 again."""
        self.taken = []

    def after_batch(
        self, trainer: Trainer, module: LightningModule, batches: int, start: Pace, now: Pace
    ) -> None:
        """Take the steps that are due; to be called after Lightning has stepped the schedules itself.

        Args:
            trainer: its schedulers are stepped by way of the module's `lr_scheduler_step`.
            module: the one in training.
            batches: those of this epoch that are over.
            start: the pace to keep.
            now: the pace of this epoch.
        """
        over = (
            start.epoch_batches
            if batches == now.epoch_batches
            else batches * now.device_batch_size // start.device_batch_size
        )
        configs = [
            config
            for config in trainer.lr_scheduler_configs
            if config.interval == "step" and not config.reduce_on_plateau
        ]
        self.taken += [0] * (len(configs) - len(self.taken))
        for index, config in enumerate(configs):
            due = schedule_steps(int(over), start.epoch_batches, start.accumulation, config.frequency)
            own = (now.epoch_batches, now.accumulation, config.frequency)
            self.taken[index] += schedule_steps(batches, *own) - schedule_steps(batches - 1, *own)
            # torch warns of a schedule that steps before the optimizer ever has: what is due then, waits.
            while self.taken[index] < due and trainer.global_step > 0:
                module.lr_scheduler_step(config.scheduler, None)
                self.taken[index] += 1

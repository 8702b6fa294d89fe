"""Logs values of single optimizer steps, as `LearningRateMonitor` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import Trainer


def log_step(trainer: Trainer, values: Callable[[], Mapping[str, float]], last_logged_step: int) -> int:
    """Log the values of the optimizer step that is about to be made, if it is the turn of one.

    `self.log` would repeat a stale value on the steps between.

    Args:
        trainer: its loggers and `callback_metrics` get the values.
        values: called if they are due.
        last_logged_step: as returned before, -1 at the start: a closure-based optimizer comes here several times
            in one step.

    Returns:
        The last step that was logged.
    """
    step = trainer.global_step
    # Lightning sets this attribute without declaring it.
    every = int(getattr(trainer, "log_every_n_steps", 0))
    due = every > 0 and (step + 1) % every == 0
    if not due or step == last_logged_step:
        return last_logged_step
    logged = dict(values())
    device = trainer.strategy.root_device
    # Apple's devices have no float64; Lightning keeps float32 elsewhere too.
    trainer.callback_metrics.update(
        {key: torch.tensor(value, dtype=torch.float32, device=device) for key, value in logged.items()}
    )
    for logger in trainer.loggers:
        logger.log_metrics(logged, step=step)
    return step

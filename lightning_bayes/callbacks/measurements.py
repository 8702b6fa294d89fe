"""What other callbacks of the same Trainer have measured."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer

from lightning_bayes.callbacks.gradient_noise_scale import GradientNoiseScale
from lightning_bayes.callbacks.stability import Stability
from lightning_bayes.callbacks.trainer.loss_reduction import reduction_of
from lightning_bayes.callbacks.trainer.settings import read_sizes
from lightning_bayes.functional.check import Measurements


def measured(trainer: Trainer, ema_decay: float | None = None) -> Measurements:
    """The latest reading of GradientNoiseScale and the sharpest of Stability, where the Trainer has them.

    The advised run starts anew: it will pass the sharpest point of this one, often the beginning, at its own
    learning rate. Gradient noise grows while training goes on: the latest is the largest.

    Args:
        trainer: with callbacks.
        ema_decay: of an average of the weights; handed on.

    Returns:
        The gradient noise scale (NaN where it was not resolved) and the largest eigenvalue of the Hessian of the mean
        loss, also where training_step returns a sum; None for what was not measured.
    """
    noise: float | None = None
    largest: float | None = None
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set without being declared
        if isinstance(callback, GradientNoiseScale) and callback.estimate is not None:
            noise = callback.estimate.noise_scale
            # An unbiased tr Σ of few gradients may come out below 0, as ‖G‖² may: that is no batch size.
            if not math.isfinite(noise) or noise <= 0:
                noise = math.nan
        if isinstance(callback, Stability):
            b = 1
            if callback.network is None and reduction_of(trainer) == "sum":
                # It measures the loss that it reads, the sum over the examples of a training_step.
                sizes = read_sizes(trainer)
                b = min(sizes.device_batch_size, sizes.dataset_size)
            values = [reading.largest_eigenvalue / b for _, reading in callback.history]
            # NaN weights have no curvature.
            largest = max(filter(math.isfinite, values), default=largest)
    return Measurements(noise, largest, ema_decay)

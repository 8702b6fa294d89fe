"""What other callbacks of the same Trainer have measured."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer

from lightning_bayes.callbacks.gradient_noise_scale import GradientNoiseScale
from lightning_bayes.callbacks.stability import Stability
from lightning_bayes.callbacks.trainer.loss_reduction import reduction_of
from lightning_bayes.callbacks.trainer.settings import read_sizes
from lightning_bayes.functional.check import Measurements


def measured(trainer: Trainer) -> Measurements:
    """The latest reading of GradientNoiseScale and the sharpest of Stability, where the Trainer has them.

    The advised run starts anew: it will pass the sharpest point of this one, often the beginning, at its own
    learning rate. Gradient noise grows while training goes on: the latest is the largest.

    Args:
        trainer: with callbacks.

    Returns:
        The gradient noise scale (NaN where it was not resolved) and the largest eigenvalue of the Hessian of the mean
        loss, also where training_step returns a sum; None for what was not measured.
    """
    noise: float | None = None
    largest: float | None = None
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set without being declared
        if isinstance(callback, GradientNoiseScale) and callback.estimate is not None:
            noise = callback.estimate.noise_scale
        if isinstance(callback, Stability):
            values = [reading.largest_eigenvalue for _, reading in callback.history]
            # NaN weights have no curvature.
            known = [value / _summed_by(callback, trainer) for value in values if math.isfinite(value)]
            largest = max(known, default=largest)
    return Measurements(None if noise is None else _resolved(noise), largest)


def _summed_by(callback: Stability, trainer: Trainer) -> int:
    """How many times the mean loss the one is whose curvature Stability measures: the examples of a training_step."""
    if callback.network is not None or reduction_of(trainer) == "mean":
        return 1
    sizes = read_sizes(trainer)
    return min(sizes.device_batch_size, sizes.dataset_size)


def _resolved(noise_scale: float) -> float:
    """NaN for what is no batch size: an unbiased tr Σ of few gradients may come out below 0, as ‖G‖² may."""
    return noise_scale if math.isfinite(noise_scale) and noise_scale > 0 else math.nan

"""What other callbacks of the same Trainer have measured."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer

from lightning_bayes.callbacks.stability import Stability
from lightning_bayes.functional.check import Measurements


def measured(trainer: Trainer) -> Measurements:
    """The latest readings of GradientNoiseScale and Stability, where the Trainer has them.

    Args:
        trainer: with callbacks.

    Returns:
        The gradient noise scale (NaN where it was not resolved) and the largest eigenvalue; None for what was not
        measured.
    """
    noise: float | None = None
    largest: float | None = None
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set without being declared
        kinds = {base.__name__ for base in type(callback).__mro__}
        if "GradientNoiseScale" in kinds:
            estimate: Any = callback.estimate
            noise = noise if estimate is None else float(estimate.noise_scale)
        if isinstance(callback, Stability) and callback.reading is not None:
            # NaN weights have no curvature.
            value = callback.reading.largest_eigenvalue
            largest = value if math.isfinite(value) else largest
    return Measurements(noise, largest)

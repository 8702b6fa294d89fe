"""Whether training_step returns a mean or a sum over its examples, read once before the first step of a run."""

import math
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_bayes.callbacks.trainer.module_reader import ModuleReader, num_examples_of
from lightning_bayes.callbacks.trainer.restore import untouched
from lightning_bayes.functional.configuration import Reduction

# The relative difference up to which the loss of a batch is the sum of those of its parts: float32 of many terms.
TOLERANCE = 1e-3

# By Trainer, for all of its callbacks; a fit begins by forgetting the one before it.
_reductions: WeakKeyDictionary[Trainer, Reduction] = WeakKeyDictionary()


def forget_reduction(trainer: Trainer) -> None:
    """At the start of a fit: its loss may be another than that of the fit before."""
    _reductions.pop(trainer, None)


def note_reduction(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
    """Reads the reduction from the first batch of a run; afterwards it does nothing.

    A loss that cannot be read on a copy counts as a mean, as does that of a module which optimizes itself: its
    training_step steps. Training is not disturbed.

    Args:
        trainer: that is fitting.
        module: whose training_step returns the loss.
        batch: on the device, as training_step is about to get it.
        batch_idx: its number.
    """
    if trainer in _reductions:
        return
    _reductions[trainer] = "mean"
    if not module.automatic_optimization:
        return
    # What the user's own code on a copy says of the loss is not worth the run.
    with untouched(trainer), torch.enable_grad(), suppress(Exception):
        reader = ModuleReader(trainer, module)
        try:
            _reductions[trainer] = reader.read(batch, batch_idx, transferred=True).reduction
        except Exception:  # a loss written by hand: its values on parts of the batch tell
            _reductions[trainer] = _reduction_by_parts(reader, batch, batch_idx)


def reduction_of(trainer: Trainer) -> Reduction:
    """The reduction that was noted; a mean before that."""
    try:
        return _reductions.get(trainer, "mean")
    except TypeError:  # not a Trainer that could be noted
        return "mean"


def _reduction_by_parts(reader: ModuleReader, batch: Any, batch_idx: int) -> Reduction:
    """A sum, where the loss of the batch is that of its first examples and that of the others together."""
    number = num_examples_of(batch)
    if number is None or number < 2:
        return "mean"

    def value(first: int, last: int) -> float:
        part = apply_to_collection(batch, Tensor, lambda t: t[first:last] if t.dim() else t)
        return reader.loss(part, batch_idx, transferred=True).item()

    half = max(1, number // 3)  # unequal, so that a mean of two means is told from half their sum
    one, other, whole = value(0, half), value(half, number), value(0, number)
    # Both of the same sign and size: a loss that is 0 is its own sum and mean.
    if not one * other > 0:
        return "mean"
    return "sum" if math.isclose(one + other, whole, rel_tol=TOLERANCE) else "mean"

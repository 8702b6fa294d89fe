"""Finds the loss inside any function: its outputs, its targets, and the likelihood that it stands for.

One of PyTorch's losses that *is* the value returned is read as it is written. A factor, a mask, weights or a further
term make the value something else, and losses are written out by hand: these are read by their graph, `any_loss`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_bayes.capture.any_loss.cut import HowRead
from lightning_bayes.capture.any_loss.reading import read_by_graph
from lightning_bayes.capture.loss_calls import (
    LossCalls,
    Reduction,
    loss_of,
    overridden,
    readable_call,
    reduction_of_call,
)
from lightning_bayes.capture.pytorch_losses import (
    READERS,
    WAY_OUT,
    GroupingOf,
    UnreadLossError,
    one_row_each,
)
from lightning_bayes.likelihoods import Likelihood

__all__ = ["WAY_OUT", "CapturedLoss", "HowRead", "Reduction", "capture_loss", "loss_of"]


@dataclass(frozen=True)
class CapturedLoss:
    """A loss that is the negative log-likelihood of `targets` given `outputs`, up to its reduction.

    Both are as `likelihood.prepare` returns them: the weights of this call are in the targets. `unit_loss` is the
    likelihood's, with its graph; `value` is what the training_step returned.
    """

    outputs: Tensor
    targets: Any
    likelihood: Likelihood
    unit_loss: Tensor
    reduction: Reduction
    value: float

    @property
    def scale(self) -> float:
        """The factor s for which the loss is s · `unit_loss` of this batch, up to a constant."""
        scale = self.likelihood.torch_terms
        if self.reduction == "sum":
            return scale
        num_terms = self.likelihood.num_terms(self.outputs, self.targets)
        # As in PyTorch, the mean over no token at all is not a number.
        return scale / num_terms if num_terms else math.nan


def capture_loss(
    step: Callable[[], object],
    likelihood: Likelihood | None = None,
    grouping_of: GroupingOf = lambda num_examples, outputs: one_row_each,
    how: HowRead | None = None,
    num_examples: int | None = None,
    part: Callable[[int], Callable[[], object]] | None = None,
) -> CapturedLoss:
    """Run a training step and read the likelihood from the loss that it returns.

    Args:
        step: Returns the loss, or a mapping that holds it under "loss". It is run again where the loss has to be read
            by its graph, on the same random draws.
        likelihood: Overrides the likelihood of the loss found, e.g. a Gaussian with its own noise; it must
            be of the same kind, and its own parameters count, not those of the call.
        grouping_of: Finds from the number of examples and the outputs that the loss saw how their rows make examples.
        how: What earlier batches have settled.
        num_examples: N of the batch, None where it does not say and each row is one.
        part: Makes the step on the first so many examples alone, which tells a mean from a sum.

    Raises:
        ValueError: If the loss is no sum over examples, or no likelihood can be made of it.
    """
    how = HowRead() if how is None else how
    if not how.is_by_graph:
        draws = torch.get_rng_state()
        try:
            return _as_written(step, likelihood, grouping_of, num_examples)
        except UnreadLossError as error:
            how.why, how.is_by_graph = str(error).replace(WAY_OUT, "").strip(), True
            torch.set_rng_state(draws)
    return CapturedLoss(*read_by_graph(step, how, likelihood, grouping_of, num_examples, part))


def _as_written(
    step: Callable[[], object],
    likelihood: Likelihood | None,
    grouping_of: GroupingOf,
    num_examples: int | None,
) -> CapturedLoss:
    """Read a loss of PyTorch's that is the value returned.

    Raises:
        UnreadLossError: If it is not, and its graph may tell.
        ValueError: If it cannot be meant.
    """
    with LossCalls() as recorder:
        loss = loss_of(step())
    call = readable_call(recorder.calls, loss)
    reading = READERS[call.function](call, grouping_of(num_examples, call.arguments["input"]))
    read = reading.likelihood
    outputs, targets = read.prepare(reading.outputs, reading.targets)
    num_terms = read.num_terms(outputs.detach(), targets)
    unit_loss, value = read.unit_loss(outputs, targets), loss.item()
    reduction = reduction_of_call(call, reading, outputs.detach(), num_terms, unit_loss.item(), value)
    if likelihood is not None:
        read = overridden(call.name, reading.likelihood, likelihood)
        outputs, targets = read.prepare(reading.outputs, reading.targets)
        unit_loss = read.unit_loss(outputs, targets)
    return CapturedLoss(outputs, targets, read, unit_loss, reduction, value)

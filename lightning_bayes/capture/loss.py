"""Finds the loss inside any function: its outputs, its targets, and the likelihood that it stands for.

One of PyTorch's losses that *is* the value returned is read as it is written. A factor, a mask, weights or a further
term make the value something else, and losses are written out by hand: these are read by their graph, `any_loss`.
"""

from collections.abc import Callable

import torch

from lightning_bayes.capture.any_loss.cut import HowRead
from lightning_bayes.capture.any_loss.reading import read_by_graph
from lightning_bayes.capture.loss_calls import CapturedLoss, Reduction, as_written, loss_of
from lightning_bayes.capture.pytorch_losses import WAY_OUT, GroupingOf, UnreadLossError, one_row_each
from lightning_bayes.errors import ReadOtherwiseError
from lightning_bayes.likelihoods import Likelihood

__all__ = ["WAY_OUT", "CapturedLoss", "HowRead", "Reduction", "capture_loss", "loss_of"]


def capture_loss(
    step: Callable[[], object],
    likelihood: Likelihood | None = None,
    grouping_of: GroupingOf = lambda num_examples, outputs: one_row_each,
    how: HowRead | None = None,
    num_examples: int | None = None,
    again: Callable[[int | None], Callable[[], object]] | None = None,
) -> CapturedLoss:
    """Run a training step and read the likelihood from the loss that it returns.

    Args:
        step: Returns the loss, or a mapping that holds it under "loss".
        likelihood: Overrides the likelihood of the loss found, e.g. a Gaussian with its own noise; it must
            be of the same kind, and its own parameters count, not those of the call.
        grouping_of: Finds from the number of examples and the outputs that the loss saw how their rows make examples.
        how: What earlier batches have settled.
        num_examples: N of the batch, None where it does not say and each row is one.
        again: Makes the step anew, where the loss has to be read by its graph: of all examples on the same random
            draws, or of the first so many alone, which tells a mean from a sum. None where `step` may be run again,
            and there are no parts.

    Raises:
        ReadOtherwiseError: If it was a loss as it is written in earlier batches, and is none in this one.
        ValueError: If the loss is no sum over examples, or no likelihood can be made of it.
    """
    how = HowRead() if how is None else how
    if not how.is_by_graph:
        draws = torch.get_rng_state()
        try:
            captured = as_written(step, likelihood, grouping_of, num_examples)
            how.is_as_written = True
            return captured
        except UnreadLossError as error:
            how.why, how.is_by_graph = str(error).replace(WAY_OUT, "").strip(), True
            if how.is_as_written:  # a sum over eight is a mean in a batch of eight
                raise ReadOtherwiseError(str(error)) from error
            torch.set_rng_state(draws)
            step = step if again is None else again(None)
    return CapturedLoss(*read_by_graph(step, how, likelihood, grouping_of, num_examples, again))

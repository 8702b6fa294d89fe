"""The error that stands for "not for these weights": everything else is a mistake in the call."""

import math

from torch import Tensor


class EvidenceUnavailableError(ValueError):
    """The evidence does not exist for the present weights or outputs, though the request was right.

    Raised for weights or logits that are not finite, a vanishing residual variance, a loss that has
    stopped being the negative log-likelihood. `LaplaceEvidence` turns it into a warning and goes on.
    """


class ReadOtherwiseError(EvidenceUnavailableError):
    """A batch has told that the loss is to be read in another way than those before it: a reading begins anew."""


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise `EvidenceUnavailableError` unless every entry is finite."""
    if math.isfinite(tensor.sum().item()):  # nothing is added to NaN or infinity that makes it finite again
        return
    finite = tensor.isfinite()
    if not bool(finite.all()):
        raise EvidenceUnavailableError(
            f"{int((~finite).sum())} of {tensor.numel()} entries of {what} are NaN or infinite."
        )

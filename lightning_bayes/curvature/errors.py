"""The error that stands for "not for these weights": everything else is a mistake in the call."""

__all__ = ["EvidenceUnavailableError"]


class EvidenceUnavailableError(ValueError):
    """The evidence does not exist for the present weights or outputs, though the request was right.

    Raised for weights or logits that are not finite, a vanishing residual variance, a loss that has
    stopped being the negative log-likelihood. `LaplaceEvidence` turns it into a warning and goes on.
    """

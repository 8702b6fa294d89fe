"""Sharpness in Keskar's sense: how much a small box about the weights holds of a larger loss."""

from __future__ import annotations

from lightning_bayes.functional._validation import finite


def keskar_sharpness(loss: float, largest_loss: float) -> float:
    """How much the loss rises within a small box about the weights, in percent of 1 + loss.

    100 (max_{y ∈ C} f(x + y) - f(x)) / (1 + f(x)),    C = {y : abs(yᵢ) ≤ ε (abs(xᵢ) + 1)}

    Args:
        loss: f(x), mean loss at the weights; above -1.
        largest_loss: the largest loss in the box; a lower bound of it gives a lower bound.

    Returns:
        The sharpness in percent.

    Raises:
        ValueError: if a loss is not finite, or `loss` is -1 or less, where the measure means nothing.

    Reference:
        Keskar et al., On Large-Batch Training for Deep Learning, ICLR 2017, arXiv:1609.04836, metric 2.1 with
        A = I.
    """
    base = finite("loss", loss)
    if base <= -1:
        raise ValueError(
            f"Expected argument `loss` to be above -1, but got {loss!r}: the measure divides by 1 + loss, which is"
            " meant for losses that are at least 0."
        )
    return 100 * (finite("largest_loss", largest_loss) - base) / (1 + base)

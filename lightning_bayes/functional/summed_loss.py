"""What a loss that sums the examples of a training_step changes: the batch that goes with a learning rate."""

from __future__ import annotations

import math

from lightning_bayes.functional.configuration import Configuration, Goal, NoSolutionError
from lightning_bayes.functional.noise_scale import momentum_factor


def summed_batch_size(present: Configuration, goal: Goal, rule: str) -> float:
    """The batch at which a learning rate of a summed loss keeps the noise of the present run.

    exact:   g = ε (N - B) (1 - τ) / (k (1 - m))  so  B' = N' - g k (1 - m') / (ε' (1 - τ'))
    linear:  B ∝ ε b N (1 - τ) / (1 - m), b = B/k: B cancels, and the rule chooses no batch
    sqrt:    ε b ∝ √B  so  B' = B (ε/ε')²

    k is the number of batches that an optimizer step averages. The learning rate of a sum grows with the batch by
    itself, so g hardly depends on B while B is far below N.

    Args:
        present: of a summed loss; its learning rate is above 0.
        goal: what holds after the change, but for the batch.
        rule: "exact", "linear" or "sqrt".

    Returns:
        B', not rounded.

    Raises:
        NoSolutionError: where no batch keeps it.
    """
    factor = momentum_factor(goal.momentum, goal.dampening)
    if rule == "exact":
        batch = goal.dataset_size - present.noise_scale * present.averaged_batches / (
            goal.learning_rate * factor
        )
        return _at_least_one(batch, goal)
    if rule == "sqrt":
        ratio = present.learning_rate / goal.learning_rate
        return _at_least_one(present.batch_size * ratio * ratio, goal)
    before = momentum_factor(present.momentum, present.dampening)
    kept = (goal.learning_rate * goal.dataset_size * factor) / (
        present.learning_rate * present.dataset_size * before
    )
    if not math.isclose(kept, 1.0, rel_tol=1e-9):
        raise NoSolutionError(
            "The linear rule chooses no batch size for a summed loss, whose step grows with the batch by itself: it"
            f" asks for a learning rate of {goal.learning_rate / kept:.6g} at every batch."
        )
    return _at_least_one(present.batch_size, goal)


def _at_least_one(batch_size: float, goal: Goal) -> float:
    if not 1 <= batch_size <= goal.dataset_size:
        raise NoSolutionError(
            f"No batch keeps the noise scale with a learning rate of {goal.learning_rate:.6g} on the summed loss:"
            f" it would hold {batch_size:.4g} of {goal.dataset_size} examples. Solve for the learning rate, by a"
            " target batch size."
        )
    return batch_size

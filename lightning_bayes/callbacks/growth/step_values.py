"""What is logged of a step while the batch grows: its batch size and its learning rates."""

from collections.abc import Sequence


def step_values(batch_size: int, learning_rates: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """Keys without their prefix and values; one learning rate for each group where there are names for them.

    Args:
        batch_size: B of the latest step, over all devices and micro-batches.
        learning_rates: Of each parameter group in that step.
        names: Of the groups; none where their learning rates never differed.
    """
    values = {"batch_size": float(batch_size)}
    if not names:
        return values | {"learning_rate": learning_rates[0]}
    return values | {f"learning_rate-{name}": rate for name, rate in zip(names, learning_rates, strict=True)}

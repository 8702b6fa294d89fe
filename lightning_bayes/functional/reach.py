"""How far a move may go before a check fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lightning_bayes.functional.check import Check


def largest_batch_size(low: float, high: float, checks_at: Callable[[int], Iterable[Check]]) -> int | None:
    """The largest batch size below one that fails at which no check fails, found by bisection.

    Args:
        low: the present batch size.
        high: one that fails; every limit is passed once, on the way up.
        checks_at: the checks of the move to a batch size.

    Returns:
        The largest whole batch size above `low` and below `high` without a failed check; None if there is none.
    """

    def passes(batch_size: int) -> bool:
        return all(check.passed is not False or check.action for check in checks_at(batch_size))

    good, bad = int(low) + 1, int(high)
    if good >= bad or not passes(good):
        return None
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if passes(middle) else (good, middle)
    return good


def reach_note(batch_size: int, learning_rate: float) -> str:
    """How far the move may go, in words."""
    up_to = f"Up to a batch of {batch_size}, with a learning rate of {learning_rate:.4g},"
    return f"{up_to} nothing that is known here fails."

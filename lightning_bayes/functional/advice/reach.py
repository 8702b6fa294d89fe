"""How far a move may go before a check fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

from lightning_bayes.functional.adam_scaling import AdamConfiguration
from lightning_bayes.functional.advice.wording import AnyMove
from lightning_bayes.functional.check import Check
from lightning_bayes.functional.configuration import Configuration, Targets

BISECTIONS = 40
SMALLEST_SHARE = 1e-6

AnyPresent = Configuration | AdamConfiguration


def failing(move: AnyMove) -> tuple[str, ...]:
    """The checks that a move fails, by name."""
    return tuple(dict.fromkeys(check.name for check in move.checks if _fails(check)))


def furthest(
    present: AnyPresent, targets: Targets, move_to: Callable[[Targets], AnyMove]
) -> tuple[AnyMove | None, tuple[str, ...]]:
    """The largest move towards the targets that no check fails, found by bisection between present and asked.

    Every limit is taken to be passed once on the way.

    Args:
        present: the configuration as it is.
        targets: what is asked for.
        move_to: the move to other targets.

    Returns:
        The move, None where already the smallest fails; and the checks that fail just beyond it.
    """
    whole = move_to(targets)
    if not failing(whole):
        return whole, ()
    good, bad = _smallest(present, targets), 1.0
    best, beyond = move_to(part_of(present, targets, good)), failing(whole)
    if good >= 1 or failing(best):
        return None, failing(best)
    for _ in range(BISECTIONS):
        middle = (good + bad) / 2
        move = move_to(part_of(present, targets, middle))
        if names := failing(move):
            bad, beyond = middle, names
        else:
            good, best = middle, move
    return best, beyond


def part_of(present: AnyPresent, targets: Targets, share: float) -> Targets:
    """Targets that go a share of the way from the present values, whole numbers rounded towards these.

    Args:
        present: the configuration as it is.
        targets: what is asked for.
        share: in (0, 1].

    Returns:
        The learning rate and 1 - m in proportion, sizes in between.
    """
    values: dict[str, float] = {}
    for field in fields(targets):
        goal, start = getattr(targets, field.name), getattr(present, field.name, None)
        if goal is None or start is None:
            continue
        if field.name == "learning_rate":
            values[field.name] = start * (goal / start) ** share
        elif field.name == "momentum":
            values[field.name] = 1 - (1 - start) ** (1 - share) * (1 - goal) ** share
        else:
            first = math.ceil(start) if goal < start else math.floor(start)
            # A hair more than the share, so that rounding does not lose a whole example.
            values[field.name] = first + int((goal - first) * share + (1e-6 if goal > first else -1e-6))
    return replace(targets, **values)  # type: ignore[arg-type]


def reach_note(present: AnyPresent, targets: Targets, move: AnyMove) -> str | None:
    """In words how far a growing batch may go, where the target goes too far."""
    safe = move.safe
    if (
        targets.batch_size is None
        or safe is None
        or not present.batch_size < safe.batch_size < targets.batch_size
    ):
        return None
    up_to = f"Up to a batch of {safe.batch_size:.0f}, with a learning rate of {safe.learning_rate:.4g},"
    return f"{up_to} nothing that is known here fails."


def _smallest(present: AnyPresent, targets: Targets) -> float:
    """The share of the smallest move: one example more or less where nothing but whole numbers changes."""
    steps = [SMALLEST_SHARE]
    if targets.learning_rate is None and targets.momentum is None:
        sizes = [
            abs(goal - start)
            for goal, start in (
                (targets.batch_size, present.batch_size),
                (targets.dataset_size, present.dataset_size),
            )
            if goal is not None and start is not None and goal != start
        ]
        steps = [min(1.0, 1 / min(sizes))] if sizes else [1.0]
    return steps[0]


def _fails(check: Check) -> bool:
    return check.passed is False and not check.action

"""Advice in few words: the answer in one line, and the caveats that its checks amount to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from lightning_bayes.functional.adam_scaling import AdamConfiguration
from lightning_bayes.functional.check import SOLUTION, Check, Verdict
from lightning_bayes.functional.configuration import Configuration, Unknown

SHORT = {"learning_rate": "lr", "batch_size": "batch", "momentum": "momentum", "dataset_size": "N"}


class AnyMove(Protocol):
    """What the moves of SGD and of Adam have in common."""

    @property
    def solved_for(self) -> Unknown: ...  # noqa: D102

    @property
    def solution(self) -> Configuration | AdamConfiguration | None: ...  # noqa: D102

    @property
    def linear(self) -> Configuration | AdamConfiguration | None: ...  # noqa: D102

    @property
    def checks(self) -> tuple[Check, ...]: ...  # noqa: D102

    @property
    def safe(self) -> Configuration | AdamConfiguration | None: ...  # noqa: D102

    @property
    def limited_by(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def verdict(self) -> Verdict: ...  # noqa: D102


def headline(targets: Mapping[str, float], moves: Sequence[AnyMove]) -> str:
    """The answer in one line: what is given, what follows from it, how sure that is, can the Trainer do it.

    Where a check fails the largest move that none fails comes first: it is the one to take.

    Args:
        targets: what is given, by the names of its fields.
        moves: the ways to keep the noise.

    Returns:
        Such as "batch 2048: lr 0.8299 (linear 0.8); safe, 6 checks pass; Trainer: yes", or "up to batch 5000: lr
        2.159 (batch size limits it); asked, batch 8192: lr 3.807 (linear 3.2); doubtful, 2 of 6 checks fail".
    """
    passing = [move for move in moves if move.verdict in ("safe", "unverified")]
    if not passing:
        firsts = dict.fromkeys(_largest_safe(targets, move) for move in moves)
        return f"{', or '.join(firsts)}; asked, {_asked(targets, moves)}"
    # What passes is the answer: the others come after it.
    return _asked(targets, [*passing, *(move for move in moves if move not in passing)])


def _largest_safe(targets: Mapping[str, float], move: AnyMove) -> str:
    """The part of a move that no check fails, and which check limits it."""
    limits = " and ".join(name.replace("_", " ") for name in move.limited_by) or "every check"
    verb = "limit it" if len(move.limited_by) > 1 else "limits it"
    if move.safe is None:
        return f"no move to a new {move.solved_for.replace('_', ' ')} passes ({limits})"
    # With both targets one of them is in the place of the value that is solved for.
    given = [name for name in targets if name != move.solved_for]
    parts = ", ".join(f"{SHORT[name]} {_solved(getattr(move.safe, name))}" for name in given)
    value = _solved(getattr(move.safe, move.solved_for))
    return f"up to {parts}: {SHORT[move.solved_for]} {value} ({limits} {verb})"


def _asked(targets: Mapping[str, float], moves: Sequence[AnyMove]) -> str:
    given = ", ".join(f"{SHORT[name]} {_number(value)}" for name, value in targets.items())
    if {"batch_size", "learning_rate"} <= targets.keys():
        # Both leave nothing to solve for: either of them, in place of its target, restores the noise.
        given += ": instead"
    else:
        given += ":"
    answers, tails = [_answer(move) for move in moves], [_tail(move) for move in moves]
    if len(set(tails)) == 1:
        return f"{given} {', or '.join(answers)}{tails[0]}"
    return f"{given} {', or '.join(answer + tail for answer, tail in zip(answers, tails, strict=True))}"


def caveats_of(moves: Sequence[AnyMove], notes: Sequence[str]) -> tuple[str, ...]:
    """Everything that limits the advice or goes with it, each a sentence: the checks that do not pass, and notes.

    Args:
        moves: the ways to keep the noise.
        notes: what is to be said beside the checks.

    Returns:
        The sentences, those about one of several moves with its name before them.
    """
    return (*dict.fromkeys(sentence for sentence in _sentences(moves)), *notes)


def shared_checks(moves: Sequence[AnyMove]) -> tuple[Check, ...]:
    """The checks that several moves have in common, word for word."""
    first, *others = (move.checks for move in moves)
    return tuple(check for check in first if others and all(check in other for other in others))


def _sentences(moves: Sequence[AnyMove]) -> Iterator[str]:
    shared = shared_checks(moves)
    yield from (check.sentence for check in shared if not check.passed)
    for move in moves:
        which = f"With the new {move.solved_for.replace('_', ' ')}: " if len(moves) > 1 else ""
        for check in move.checks:
            if not check.passed and check not in shared:
                yield which + check.sentence


def _answer(move: AnyMove) -> str:
    if move.solution is None:
        return f"no {move.solved_for.replace('_', ' ')} keeps the noise"
    value, other = getattr(move.solution, move.solved_for), getattr(move.linear, move.solved_for, None)
    first, second = _solved(value), None if other is None else _solved(other)
    linear = "" if second is None or second == first else f" (linear {second})"
    return f"{SHORT[move.solved_for]} {first}{linear}"


def _solved(value: float) -> str:
    """A batch of 23456 is not to read 2.346e+04."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def _tail(move: AnyMove) -> str:
    if move.solution is None:
        return ""
    trainer = next((check for check in move.checks if check.name == "trainer"), None)
    can = "" if trainer is None else f"; Trainer: {'yes' if trainer.passed or trainer.action else 'no'}"
    return f"; {_how_sure(move)}{can}"


def _how_sure(move: AnyMove) -> str:
    checks = [check for check in move.checks if not check.action]
    if move.verdict == "safe":
        return f"safe, {len(checks)} checks pass"
    failed = move.verdict == "doubtful"
    number = sum(check.passed is (False if failed else None) for check in checks)
    ends = f"checks fail{'s' if number == 1 else ''}" if failed else "unmeasured"
    return f"{move.verdict}, {number} of {len(checks)} {ends}"


def no_solution(reason: str) -> Check:
    """The check that there is a solution, where there is none, and why."""
    return Check(SOLUTION, False, None, None, reason)

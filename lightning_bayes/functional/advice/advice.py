"""Advice as data, and in few words: the answer in one line, and the caveats that its checks amount to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic

from lightning_bayes.functional.check import SOLUTION, Check, Verdict
from lightning_bayes.functional.configuration import ConfigurationType, Unknown

SHORT = {"learning_rate": "lr", "batch_size": "batch", "momentum": "momentum", "dataset_size": "N"}


@dataclass(frozen=True)
class Move(Generic[ConfigurationType]):
    """One way to keep the noise: everything as targeted, and one value solved for.

    Attributes:
        solved_for: "learning_rate" or "batch_size"; Adam's betas and eps move along with either.
        advised: the configuration by the optimizer's own rule, the exact inverse of g or Adam's square root; None
            where that has no solution (a check says why).
        linear: the configuration by B ∝ ε N / (1 - m), with Adam B ∝ ε, betas and eps as they are: common in
            practice, and the other end of the range to try. None where it leaves the training set.
        why: the equations with their numbers put in.
        checks: what the move was held against, and what is to be done with it.
        safe: the largest move of this kind that no check fails: `advised` where none fails, else one that goes a part
            of the way to the targets; None where every one fails.
        limited_by: the checks that fail beyond `safe`, by name.
    """

    SAVED_TOO: ClassVar = ("exact", "verdict", "range")

    solved_for: Unknown
    advised: ConfigurationType | None
    linear: ConfigurationType | None
    why: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    safe: ConfigurationType | None = None
    limited_by: tuple[str, ...] = ()

    @property
    def exact(self) -> ConfigurationType | None:
        """`advised`, by the name that it has for SGD."""
        return self.advised

    solution = exact

    @property
    def verdict(self) -> Verdict:
        """How far to trust it: the worst of its checks, actions apart.

        "impossible" without a solution, "doubtful" where a check fails, "unverified" where none fails but one was not
        measured, else "safe".
        """
        statuses = {check.status for check in self.checks}
        if any(check.name == SOLUTION for check in self.checks):
            return "impossible"
        if "fails" in statuses:
            return "doubtful"
        return "unverified" if "not measured" in statuses else "safe"

    @property
    def range(self) -> tuple[float, float] | None:
        """The least and the largest value that the rules ask for; None where none has a solution."""
        values = [getattr(one, self.solved_for) for one in (self.advised, self.linear) if one is not None]
        return (min(values), max(values)) if values else None


@dataclass(frozen=True)
class Advice(Generic[ConfigurationType]):
    """What to do about one parameter group, as data.

    Attributes:
        present: the configuration as it is (under a schedule: at its peak learning rate).
        unchanged: the targets put in and nothing else changed; None if the batch would exceed the data.
        moves: the ways to keep the noise, each with its checks. One where its partner is solved for; else two,
            of which one is to be taken.
        notes: what is to be said beside the checks, each a sentence.
        equation: what is kept, with its numbers put in: g of the present configuration, or Adam's ε/√B, which is on
            another scale.
        name: the parameter groups it is for, such as "SGD/pg1".
        targets: what was given, by the names of the fields of a configuration.
    """

    SAVED_TOO: ClassVar = ("optimizer", "summary", "verdict")

    present: ConfigurationType
    unchanged: ConfigurationType | None
    moves: tuple[Move[ConfigurationType], ...]
    notes: tuple[str, ...]
    equation: str
    name: str = ""
    targets: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def optimizer(self) -> str:
        """Which rule applies: "sgd", or "adam" for Adam, RMSprop and their relatives."""
        return self.present.optimizer

    @property
    def exact(self) -> ConfigurationType | None:
        """The first move, by the optimizer's own rule: for SGD the exact inverse."""
        return self.moves[0].advised

    advised = exact

    @property
    def linear(self) -> ConfigurationType | None:
        """The first move, by the linear rule."""
        return self.moves[0].linear

    @property
    def safe(self) -> ConfigurationType | None:
        """The largest part of the first move that no check fails; None where every part fails one."""
        return self.moves[0].safe

    @property
    def checks(self) -> tuple[Check, ...]:
        """The checks of all moves, each once."""
        return tuple(dict.fromkeys(check for move in self.moves for check in move.checks))

    @property
    def caveats(self) -> tuple[str, ...]:
        """Everything that limits this advice or goes with it, each a sentence: checks not passed, and notes."""
        sentences = []
        for which, checks in self.checks_by_move():
            start = f"With the {which}: " if which else ""
            sentences += [start + check.sentence for check in checks if not check.passed]
        return (*dict.fromkeys(sentences), *self.notes)

    @property
    def verdict(self) -> Verdict:
        """How far to trust the first move: "safe", "unverified", "doubtful" or "impossible"."""
        return self.moves[0].verdict

    @property
    def summary(self) -> str:
        """The answer in one line."""
        return _headline(self.targets, self.moves)

    @property
    def noise_scale_before(self) -> float:
        """What is kept, of the present configuration: g of SGD, ε/√B of Adam."""
        return self.present.noise_scale

    @property
    def noise_scale_unchanged(self) -> float | None:
        """What is kept, with the targets put in and nothing else changed."""
        return None if self.unchanged is None else self.unchanged.noise_scale

    @property
    def noise_scale_after(self) -> float | None:
        """What is kept, after the first move."""
        return None if self.exact is None else self.exact.noise_scale

    def checks_by_move(self) -> list[tuple[str, list[Check]]]:
        """The checks that several moves have in common, word for word, then those of each with what is new in it."""
        first, *others = (move.checks for move in self.moves)
        shared = [check for check in first if others and all(check in other for other in others)]
        sets = [("", shared)]
        for move in self.moves:
            which = f"new {move.solved_for.replace('_', ' ')}" if others else ""
            sets.append((which, [check for check in move.checks if check not in shared]))
        return sets


def _headline(targets: Mapping[str, float], moves: Sequence[Move[Any]]) -> str:
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


def _largest_safe(targets: Mapping[str, float], move: Move[Any]) -> str:
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


def _asked(targets: Mapping[str, float], moves: Sequence[Move[Any]]) -> str:
    """What is given, and each move's answer; how sure it is comes last where that is the same of all."""
    given = [f"{SHORT[name]} {x if isinstance(x, int) else format(x, '.5g')}" for name, x in targets.items()]
    # Both leave nothing to solve for: either of them, in place of its target, restores the noise.
    instead = " instead" if {"batch_size", "learning_rate"} <= targets.keys() else ""
    answers, tails = [_answer(move) for move in moves], [_how_sure(move) for move in moves]
    if len(set(tails)) == 1:
        tails[:-1] = [""] * (len(tails) - 1)
    last = ", or ".join(answer + tail for answer, tail in zip(answers, tails, strict=True))
    return f"{', '.join(given)}:{instead} {last}"


def _answer(move: Move[Any]) -> str:
    """The value that is solved for, and the linear rule's where it reads otherwise."""
    if move.advised is None:
        return f"no {move.solved_for.replace('_', ' ')} keeps the noise"
    advised, linear = (
        _solved(getattr(one, move.solved_for)) for one in (move.advised, move.linear or move.advised)
    )
    return f"{SHORT[move.solved_for]} {advised}" + ("" if linear == advised else f" (linear {linear})")


def _solved(value: float) -> str:
    """A batch of 23456 is not to read 2.346e+04."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _how_sure(move: Move[Any]) -> str:
    """The verdict, how many checks it is of, and whether the Trainer can."""
    if move.advised is None:
        return ""
    statuses = [check.status for check in move.checks if not check.action]
    failing, unmeasured = statuses.count("fails"), statuses.count("not measured")
    counted = f"{len(statuses)} checks pass"
    if failing:
        counted = f"{failing} of {len(statuses)} checks fail{'s' if failing == 1 else ''}"
    elif unmeasured:
        counted = f"{unmeasured} of {len(statuses)} unmeasured"
    can = [check.action for check in move.checks if check.name == "trainer"]
    trainer = "".join(f"; Trainer: {'yes' if able else 'no'}" for able in can)
    return f"; {move.verdict}, {counted}{trainer}"

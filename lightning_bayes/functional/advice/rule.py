"""What sets the optimizers apart: the rule that keeps the noise of one kind, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic

from lightning_bayes.functional.advice.advice import Move
from lightning_bayes.functional.advice.checks import Case
from lightning_bayes.functional.check import Check
from lightning_bayes.functional.configuration import ConfigurationType, Targets, Unknown


@dataclass(frozen=True)
class Rule(Generic[ConfigurationType]):
    """What keeps the noise of one kind of optimizer. `present` comes first in every call.

    Attributes:
        unknowns: what targets leave to be solved for, each a move.
        name: that of `solve`, for sentences.
        solve: the configuration that reaches targets with the noise as it is, one value solved for; raises a
            NoSolutionError where there is none.
        linear: the one by the linear rule, as above; None where nothing is to be said of its absence.
        equation: what is kept, with its numbers put in.
        why: the equations of a move.
        notes: what is to be said beside the checks of the moves, each a sentence.
        checks: what a move is held against, reasons to doubt it first.
    """

    unknowns: Callable[[Targets], tuple[Unknown, ...]]
    name: str
    solve: Callable[[ConfigurationType, Targets, Unknown], ConfigurationType]
    linear: Callable[[ConfigurationType, Targets, Unknown], ConfigurationType | None]
    equation: Callable[[ConfigurationType], str]
    why: Callable[[ConfigurationType, Targets, Move[ConfigurationType]], Iterator[str]]
    notes: Callable[
        [ConfigurationType, Targets, ConfigurationType | None, tuple[Move[ConfigurationType], ...]],
        Iterator[str],
    ]
    checks: tuple[Callable[[Case[ConfigurationType]], Iterator[Check]], ...]

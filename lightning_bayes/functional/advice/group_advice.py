"""What advice for SGD and for Adam have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lightning_bayes.functional.adam_scaling import AdamConfiguration
from lightning_bayes.functional.advice.wording import AnyMove, caveats_of, headline
from lightning_bayes.functional.check import Check, Verdict
from lightning_bayes.functional.configuration import Configuration

ConfigurationType = TypeVar("ConfigurationType", Configuration, AdamConfiguration)
MoveType = TypeVar("MoveType", bound=AnyMove)


@dataclass(frozen=True)
class GroupAdvice(Generic[ConfigurationType, MoveType]):
    """What to do about one parameter group, as data.

    Attributes:
        present: the configuration as it is (under a schedule: at its peak learning rate).
        unchanged: the targets put in and nothing else changed; None if the batch would exceed the data.
        moves: the ways to keep the noise, each with its checks. One where its partner is solved for; else two,
            of which one is to be taken.
        notes: what is to be said beside the checks, each a sentence.
        equation: what is kept, of the present configuration, with its numbers put in.
        name: the parameter groups it is for, such as "SGD/pg1".
        targets: what was given, by the names of the fields of a configuration.
    """

    present: ConfigurationType
    unchanged: ConfigurationType | None
    moves: tuple[MoveType, ...]
    notes: tuple[str, ...]
    equation: str
    name: str = ""
    targets: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def checks(self) -> tuple[Check, ...]:
        """The checks of all moves, each once."""
        return tuple(dict.fromkeys(check for move in self.moves for check in move.checks))

    @property
    def caveats(self) -> tuple[str, ...]:
        """Everything that limits this advice or goes with it, each a sentence: checks not passed, and notes."""
        return caveats_of(self.moves, self.notes)

    @property
    def verdict(self) -> Verdict:
        """How far to trust the first move: "safe", "unverified", "doubtful" or "impossible"."""
        return self.moves[0].verdict

    @property
    def summary(self) -> str:
        """The answer in one line."""
        return headline(self.targets, self.moves)

    @property
    def noise_scale_before(self) -> float:
        """What is kept, of the present configuration: g of SGD, ε/√B of Adam."""
        return self.present.noise_scale

    @property
    def noise_scale_unchanged(self) -> float | None:
        """The same with the targets put in and nothing else changed."""
        return None if self.unchanged is None else self.unchanged.noise_scale

    @property
    def noise_scale_after(self) -> float | None:
        """The same after the first move."""
        solution = self.moves[0].solution
        return None if solution is None else solution.noise_scale

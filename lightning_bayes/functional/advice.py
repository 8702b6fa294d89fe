"""Advice for SGD: what a change does to the noise scale, what keeps it, why, and when to doubt that."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_bayes.functional._validation import positive
from lightning_bayes.functional.caveats import caveats_of
from lightning_bayes.functional.configuration import Configuration, NoSolutionError, Targets, Unknown
from lightning_bayes.functional.equations import exact_equation, linear_equation, noise_scale_equation
from lightning_bayes.functional.scaling import Move, Rule, solve


@dataclass(frozen=True)
class Advice:
    """What to do about one parameter group, as data.

    Attributes:
        present: the configuration as it is (under a schedule: at its peak learning rate).
        unchanged: the targets put in and nothing else changed; None if the batch would exceed the data.
        moves: the ways to keep the noise scale. One where a batch size or a learning rate is targeted; else
            two, of which one is to be taken.
        caveats: everything that limits this advice, each a sentence.
        equation: g of the present configuration with its numbers put in.
        name: the parameter groups it is for, such as "SGD/pg1".
    """

    present: Configuration
    unchanged: Configuration | None
    moves: tuple[Move, ...]
    caveats: tuple[str, ...]
    equation: str
    name: str = ""

    @property
    def exact(self) -> Configuration | None:
        """The first move, by the exact inverse."""
        return self.moves[0].exact

    @property
    def linear(self) -> Configuration | None:
        """The first move, by the linear rule."""
        return self.moves[0].linear

    @property
    def noise_scale_before(self) -> float:
        """The noise scale g of the present configuration."""
        return self.present.noise_scale

    @property
    def noise_scale_unchanged(self) -> float | None:
        """The noise scale g with the targets put in and nothing else changed."""
        return None if self.unchanged is None else self.unchanged.noise_scale

    @property
    def noise_scale_after(self) -> float | None:
        """The noise scale g after the first move by the exact inverse."""
        return None if self.exact is None else self.exact.noise_scale


def advise(
    configuration: Configuration,
    *,
    target_batch_size: int | None = None,
    target_learning_rate: float | None = None,
    target_momentum: float | None = None,
    target_dataset_size: int | None = None,
    name: str = "",
) -> Advice:
    """What the targets do to the noise scale of SGD, which change keeps it, and every caveat that applies.

    g = ε (N/B - 1) (1 - τ) / (1 - m) stays, by its exact inverse and by the linear rule B ∝ ε N / (1 - m)

    With a batch size or a learning rate as target its partner is solved for. With neither (only momentum or
    dataset size) both moves are reported: a learning rate at the same batch, and a batch at the same learning
    rate. With both, g changes; the two moves are the single changes of a target that restore it.

    Args:
        configuration: the present one; its learning rate is above 0.
        target_batch_size: B', examples per optimizer step; whole, at most the (target) dataset size.
        target_learning_rate: ε', above 0.
        target_momentum: m', in [0, 1).
        target_dataset_size: N'; whole.
        name: copied into the advice.

    Returns:
        The advice. A move without solution is None in it, and a caveat says why.

    Raises:
        ValueError: naming the argument that is outside its domain, or if no target is given.

    Reference:
        Smith & Le, ICLR 2018, arXiv:1710.06451, section 5.
    """
    targets = Targets(target_batch_size, target_learning_rate, target_momentum, target_dataset_size)
    targets.check_against(configuration.dataset_size)
    positive("learning_rate", configuration.learning_rate)
    goal = targets.fixed(configuration)
    unchanged = goal.configuration() if goal.batch_size <= goal.dataset_size else None
    solved = [_move(configuration, targets, unknown) for unknown in targets.unknowns()]
    moves = tuple(move for move, _ in solved)
    # The same reason can hold for both moves and both rules: say it once.
    reasons = dict.fromkeys(reason for _, why_not in solved for reason in why_not)
    caveats = (*reasons, *caveats_of(configuration, targets, unchanged, moves))
    return Advice(configuration, unchanged, moves, caveats, noise_scale_equation(configuration), name)


def _move(present: Configuration, targets: Targets, unknown: Unknown) -> tuple[Move, list[str]]:
    """The move, and the reasons where a rule has no solution."""
    exact, no_exact = _solution(present, targets, "exact", unknown)
    linear, no_linear = _solution(present, targets, "linear", unknown)
    why = []
    if exact is not None:
        why.append(exact_equation(present.noise_scale, exact, unknown))
    if linear is not None:
        why.append(linear_equation(present, linear, unknown))
    return Move(unknown, exact, linear, tuple(why)), [*no_exact, *no_linear]


def _solution(
    present: Configuration, targets: Targets, rule: Rule, unknown: Unknown
) -> tuple[Configuration | None, list[str]]:
    try:
        solution = solve(present, targets, rule, unknown)
    except NoSolutionError as error:
        return None, [str(error)]
    if solution.batch_size < 1:
        return None, [
            f"The {rule} rule asks for a batch of {solution.batch_size:.3g}: a batch holds at least one"
            " example, so no batch has so large a noise scale at a learning rate of"
            f" {solution.learning_rate:g}."
        ]
    return solution, []

"""Advice for SGD: what a change does to the noise scale, what keeps it, why, and when to doubt that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning_bayes.functional._validation import positive
from lightning_bayes.functional.advice.checks import checks_of
from lightning_bayes.functional.advice.equations import exact_equation, linear_equation, noise_scale_equation
from lightning_bayes.functional.advice.group_advice import GroupAdvice
from lightning_bayes.functional.advice.reach import furthest, reach_note
from lightning_bayes.functional.advice.wording import no_solution
from lightning_bayes.functional.check import Check, Measurements
from lightning_bayes.functional.configuration import Configuration, NoSolutionError, Targets, Unknown
from lightning_bayes.functional.scaling import Move, Rule, solve
from lightning_bayes.functional.summed_loss import unit_note


@dataclass(frozen=True)
class Advice(GroupAdvice[Configuration, Move]):
    """What to do about one parameter group of SGD, as data: `GroupAdvice` by the exact inverse of g.

    g = ε (N/B - 1) (1 - τ) / (1 - m) is what its moves keep, and its `equation`.
    """

    @property
    def exact(self) -> Configuration | None:
        """The first move, by the exact inverse."""
        return self.moves[0].exact

    @property
    def linear(self) -> Configuration | None:
        """The first move, by the linear rule."""
        return self.moves[0].linear

    @property
    def safe(self) -> Configuration | None:
        """The largest part of the first move that no check fails; None where every part fails one."""
        return self.moves[0].safe


def advise(
    configuration: Configuration,
    *,
    target_batch_size: int | None = None,
    target_learning_rate: float | None = None,
    target_momentum: float | None = None,
    target_dataset_size: int | None = None,
    gradient_noise_scale: float | None = None,
    largest_eigenvalue: float | None = None,
    ema_decay: float | None = None,
    name: str = "",
) -> Advice:
    """What the targets do to the noise scale of SGD, which change keeps it, and how far to trust that.

    g = ε (N/B - 1) (1 - τ) / (1 - m) stays, by its exact inverse and by the linear rule B ∝ ε N / (1 - m)

    With a batch size or a learning rate as target its partner is solved for. With neither (only momentum or
    dataset size) both moves are reported: a learning rate at the same batch, and a batch at the same learning
    rate. With both, g changes; the two moves are the single changes of a target that restore it.

    Args:
        configuration: the present one; its learning rate is above 0. With a summed loss it and every learning rate
            here are those of the sum, for the batch that goes with them.
        target_batch_size: B', examples per optimizer step; whole, at most the (target) dataset size.
        target_learning_rate: ε', above 0.
        target_momentum: m', in [0, 1).
        target_dataset_size: N'; whole.
        gradient_noise_scale: measured B_simple = tr Σ/‖G‖² in examples; NaN where it was not resolved.
        largest_eigenvalue: measured h of the Hessian of the mean loss, whatever the reduction.
        ema_decay: ρ in [0, 1) of an average of the weights, if there is one.
        name: copied into the advice.

    Returns:
        The advice. A move without solution is None in it, and its check "solution" says why.

    Raises:
        ValueError: naming the argument that is outside its domain, or if no target is given.

    Reference:
        Smith & Le, ICLR 2018, arXiv:1710.06451, section 5.
    """
    targets = Targets(target_batch_size, target_learning_rate, target_momentum, target_dataset_size)
    measured = Measurements(gradient_noise_scale, largest_eigenvalue, ema_decay)
    targets.check_against(configuration.dataset_size)
    positive("learning_rate", configuration.learning_rate)
    goal = targets.fixed(configuration)
    unchanged = goal.configuration() if goal.batch_size <= goal.dataset_size else None
    moves = tuple(_bounded(configuration, targets, unknown, measured) for unknown in targets.unknowns())
    unit = unit_note(configuration.reduction, configuration.averaged_batches)
    reach = reach_note(configuration, targets, moves[0]) if len(moves) == 1 else None
    notes = (
        *(note for note in (reach, unit) if note is not None),
        *_notes(configuration, targets, unchanged, moves),
    )
    equation = noise_scale_equation(configuration)
    return Advice(configuration, unchanged, moves, notes, equation, name, targets.given())


def _bounded(present: Configuration, targets: Targets, unknown: Unknown, measured: Measurements) -> Move:
    """The move, and how much of it no check fails."""
    move = _move(present, targets, unknown, measured)
    safe, limits = furthest(present, targets, lambda part: _move(present, part, unknown, measured))
    return replace(move, safe=safe.solution if isinstance(safe, Move) else None, limited_by=limits)


def _move(present: Configuration, targets: Targets, unknown: Unknown, measured: Measurements) -> Move:
    exact, no_exact = _solution(present, targets, "exact", unknown)
    linear, no_linear = _solution(present, targets, "linear", unknown)
    why = []
    checks: list[Check] = []
    if exact is not None:
        why.append(exact_equation(present.noise_scale, exact, unknown))
        checks += checks_of(present, exact, linear, unknown, measured)
    else:
        checks.append(no_solution(no_exact))
    if linear is not None:
        why.append(linear_equation(present, linear, unknown))
    elif no_linear != no_exact:
        checks.insert(0, Check("rules_agree", False, None, None, no_linear))
    return Move(unknown, exact, linear, tuple(why), tuple(checks))


def _solution(
    present: Configuration, targets: Targets, rule: Rule, unknown: Unknown
) -> tuple[Configuration | None, str]:
    """The configuration by a rule, or the reason why there is none."""
    try:
        solution = solve(present, targets, rule, unknown)
    except NoSolutionError as error:
        return None, str(error)
    if solution.batch_size < 1:
        return None, (
            f"The {rule} rule asks for a batch of {solution.batch_size:.3g}: a batch holds at least one"
            " example, so no batch has so large a noise scale at a learning rate of"
            f" {solution.learning_rate:g}."
        )
    return solution, ""


def _notes(
    present: Configuration, targets: Targets, unchanged: Configuration | None, moves: tuple[Move, ...]
) -> Iterator[str]:
    if targets.momentum == 0 and present.dampening > 0:
        yield "Dampening acts through the momentum buffer: without momentum it is 0."
    if len(moves) < 2:
        return
    if targets.batch_size is None and targets.learning_rate is None:
        if all(move.exact is not None for move in moves):
            yield "The learning rate and the batch size are alternatives: change one of them, not both."
        return
    if unchanged is not None:
        before, after = present.noise_scale, unchanged.noise_scale
        times = f", {after / before:.3g} times the present one" if before > 0 and after > 0 else ""
        yield f"With both targets the noise scale goes from {before:.6g} to {after:.6g}{times}."
    goal = targets.fixed(present)
    for move in moves:
        if move.exact is None:
            continue
        if move.solved_for == "learning_rate":
            learning_rate = f"{move.exact.learning_rate:.6g}"
            yield f"To restore it at a batch size of {goal.batch_size:g}: learning rate {learning_rate}."
        else:
            batch_size = f"{move.exact.batch_size:.6g}"
            yield f"To restore it at a learning rate of {goal.learning_rate:g}: batch size {batch_size}."

"""What a change does to the noise of training, what keeps it, how far to trust that, and how far it may go."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from lightning_bayes.functional._validation import positive
from lightning_bayes.functional.advice.adam_rule import ADAM
from lightning_bayes.functional.advice.advice import Advice, Move
from lightning_bayes.functional.advice.checks import Case
from lightning_bayes.functional.advice.rule import Rule
from lightning_bayes.functional.advice.sgd_rule import SGD
from lightning_bayes.functional.check import SOLUTION, Check, Measurements
from lightning_bayes.functional.configuration import (
    AdamConfiguration,
    AnyConfiguration,
    ConfigurationType,
    NoSolutionError,
    Targets,
    Unknown,
)

RULES: dict[str, Rule[Any]] = {"sgd": SGD, "adam": ADAM}
BISECTIONS = 40
SMALLEST_SHARE = 1e-6


def advise(
    configuration: ConfigurationType,
    *,
    target_batch_size: int | None = None,
    target_learning_rate: float | None = None,
    target_momentum: float | None = None,
    target_dataset_size: int | None = None,
    gradient_noise_scale: float | None = None,
    largest_eigenvalue: float | None = None,
    ema_decay: float | None = None,
    name: str = "",
) -> Advice[ConfigurationType]:
    """What the targets do to the noise of training, which change keeps it, and how far to trust that.

    SGD:   g = ε (N/B - 1) (1 - τ) / (1 - m) stays, by its exact inverse and by the linear rule B ∝ ε N / (1 - m)
    Adam:  B → κB,   ε → ε√κ,   1-β → κ(1-β) for every β,   eps → eps/√κ

    With a batch size or a learning rate as target its partner is solved for. With neither (only momentum or
    dataset size) both moves are reported: a learning rate at the same batch, and a batch at the same learning
    rate. With both, the noise changes; the two moves are the single changes of a target that restore it.

    Args:
        configuration: the present one; its learning rate is above 0. With a summed loss it and every learning rate
            here are those of the sum, for the batch that goes with them.
        target_batch_size: B', examples per optimizer step; whole, at most the (target) dataset size if known.
        target_learning_rate: ε', above 0.
        target_momentum: m', in [0, 1); SGD only.
        target_dataset_size: N'; whole. Adam's rule does not depend on it, weight decay does.
        gradient_noise_scale: measured B_simple = tr Σ/‖G‖² in examples; NaN where it was not resolved.
        largest_eigenvalue: measured h of the Hessian of the mean loss, whatever the reduction; SGD only.
        ema_decay: ρ in [0, 1) of an average of the weights, if there is one.
        name: copied into the advice.

    Returns:
        The advice. A move without solution is None in it, and its check "solution" says why.

    Raises:
        ValueError: naming the argument that is outside its domain or of SGD only, or if no target is given.

    Reference:
        Smith & Le, ICLR 2018, arXiv:1710.06451, section 5; for Adam Malladi et al., NeurIPS 2022,
        arXiv:2205.10287.
    """
    targets = Targets(target_batch_size, target_learning_rate, target_momentum, target_dataset_size)
    measured = Measurements(gradient_noise_scale, largest_eigenvalue, ema_decay)
    if largest_eigenvalue is not None and isinstance(configuration, AdamConfiguration):
        raise ValueError(
            "Expected argument `largest_eigenvalue` to be None for an Adam-like optimizer, but got"
            f" {largest_eigenvalue!r}: what bounds its learning rate is the curvature of its preconditioned loss."
            " Leave it out."
        )
    return advice_on(configuration, targets, measured, name)


def advice_on(
    present: ConfigurationType, targets: Targets, measured: Measurements, name: str = ""
) -> Advice[ConfigurationType]:
    """`advise` for what is already gathered; a curvature, which says nothing of Adam, is left out there."""
    rule: Rule[ConfigurationType] = RULES[present.optimizer]
    unknowns, unchanged = rule.unknowns(targets), targets.unchanged(present)
    positive("learning_rate", present.learning_rate)
    moves: tuple[Move[ConfigurationType], ...] = ()
    for unknown in unknowns:
        move = _move(present, targets, unknown, measured)
        safe, limits = _furthest(move, present, targets, measured)
        why = tuple(rule.why(present, targets, move))
        moves += (replace(move, why=why, safe=safe, limited_by=limits),)
    equation, notes = rule.equation(present), tuple(rule.notes(present, targets, unchanged, moves))
    reach, asked = moves[0].safe, targets.batch_size
    if len(moves) == 1 and asked is not None and reach and present.batch_size < reach.batch_size < asked:
        up_to = f"Up to a batch of {reach.batch_size:.0f}, with a learning rate of {reach.learning_rate:.4g},"
        notes = (f"{up_to} nothing that is known here fails.", *notes)
    return Advice(present, unchanged, moves, notes, equation, name, targets.given())


def _move(
    present: ConfigurationType, targets: Targets, unknown: Unknown, measured: Measurements
) -> Move[ConfigurationType]:
    """The configurations by the optimizer's rule and by the linear one, and what the first is held against."""
    rule: Rule[ConfigurationType] = RULES[present.optimizer]
    advised, no_advised = _attempt(rule.name, rule.solve, present, targets, unknown)
    linear, no_linear = _attempt("linear", rule.linear, present, targets, unknown)
    checks: list[Check] = []
    if no_linear and no_linear != no_advised:
        checks.append(Check("rules_agree", False, None, None, no_linear))
    if advised is None:
        checks.append(Check(SOLUTION, False, None, None, no_advised))
    else:
        case = Case(present, advised, linear, unknown, measured)
        for check in rule.checks:
            checks += check(case)
    return Move(unknown, advised, linear, (), tuple(checks))


def _attempt(
    name: str,
    solve: Callable[[ConfigurationType, Targets, Unknown], ConfigurationType | None],
    present: ConfigurationType,
    targets: Targets,
    unknown: Unknown,
) -> tuple[ConfigurationType | None, str]:
    """The configuration by a rule, or the reason why there is none."""
    try:
        solution = solve(present, targets, unknown)
    except NoSolutionError as error:
        return None, str(error)
    if solution is not None and solution.batch_size < 1:
        return None, (
            f"The {name} rule asks for a batch of {solution.batch_size:.3g}: a batch holds at least one example, so"
            f" no batch has so much noise at a learning rate of {solution.learning_rate:g}."
        )
    return solution, ""


def _furthest(
    whole: Move[ConfigurationType], present: ConfigurationType, targets: Targets, measured: Measurements
) -> tuple[ConfigurationType | None, tuple[str, ...]]:
    """The largest part of a move that no check fails, found by bisection, and the checks that fail just beyond it.

    Every limit is taken to be passed once on the way. None, where already the smallest part fails.
    """
    beyond = _failing(whole)
    if not beyond:
        return whole.advised, ()
    good, bad = _smallest(present, targets), 1.0
    best = _move(present, _part_of(present, targets, good), whole.solved_for, measured)
    if good >= 1 or _failing(best):
        return None, _failing(best)
    for _ in range(BISECTIONS):
        middle = (good + bad) / 2
        move = _move(present, _part_of(present, targets, middle), whole.solved_for, measured)
        if names := _failing(move):
            bad, beyond = middle, names
        else:
            good, best = middle, move
    return best.advised, beyond


def _failing(move: Move[Any]) -> tuple[str, ...]:
    """The checks that a move fails, by name."""
    return tuple(dict.fromkeys(check.name for check in move.checks if check.status == "fails"))


def _smallest(present: AnyConfiguration, targets: Targets) -> float:
    """The share of the smallest move: one example more or less where nothing but whole numbers changes."""
    if targets.learning_rate is not None or targets.momentum is not None:
        return SMALLEST_SHARE
    sizes = (targets.batch_size, present.batch_size), (targets.dataset_size, present.dataset_size)
    steps = [abs(goal - start) for goal, start in sizes if goal is not None and start is not None]
    return min(1.0, 1 / min(filter(None, steps), default=1.0))


def _part_of(present: AnyConfiguration, targets: Targets, share: float) -> Targets:
    """Targets that go a share of the way from the present values, whole numbers rounded towards these.

    The learning rate and 1 - m go in proportion, sizes in between.
    """
    values: dict[str, Any] = {}
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
    return replace(targets, **values)

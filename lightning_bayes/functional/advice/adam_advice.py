"""Advice for Adam, RMSprop and their relatives: the square-root rule, its domain, and what it leaves out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning_bayes.functional._validation import positive
from lightning_bayes.functional.adam_scaling import AdamConfiguration, square_root_rule
from lightning_bayes.functional.advice.adam_checks import adam_checks_of
from lightning_bayes.functional.advice.group_advice import GroupAdvice
from lightning_bayes.functional.advice.reach import furthest, reach_note
from lightning_bayes.functional.advice.wording import no_solution
from lightning_bayes.functional.check import Check, Measurements, Verdict, verdict
from lightning_bayes.functional.configuration import NoSolutionError, Targets, Unknown


@dataclass(frozen=True)
class AdamMove:
    """One way to keep the noise of Adam.

    Attributes:
        solved_for: "learning_rate" or "batch_size"; betas and eps move along with either.
        advised: the configuration by the square-root rule; None outside its domain (a caveat says why).
        why: the equation with its numbers put in.
        linear: learning rate and batch size in proportion, betas and eps as they are: SGD's rule, common in
            practice, and the other end of the range to try. None where it leaves the training set.
        checks: what the move was held against, and what is to be done with it.
        safe: the largest move of this kind that no check fails, as in `Move`.
        limited_by: the checks that fail beyond `safe`, by name.
    """

    solved_for: Unknown
    advised: AdamConfiguration | None
    why: tuple[str, ...]
    linear: AdamConfiguration | None = None
    checks: tuple[Check, ...] = ()
    safe: AdamConfiguration | None = None
    limited_by: tuple[str, ...] = ()

    @property
    def solution(self) -> AdamConfiguration | None:
        """The configuration by the square-root rule."""
        return self.advised

    @property
    def verdict(self) -> Verdict:
        """How far to trust it, as `verdict` documents it."""
        return verdict(self.checks)

    @property
    def range(self) -> tuple[float, float] | None:
        """The least and the largest value that the rules ask for; None where none has a solution."""
        values = [getattr(move, self.solved_for) for move in (self.advised, self.linear) if move is not None]
        return (min(values), max(values)) if values else None


@dataclass(frozen=True)
class AdamAdvice(GroupAdvice[AdamConfiguration, AdamMove]):
    """What to do about one parameter group of an Adam-like optimizer, as data: `GroupAdvice` by the square-root rule.

    ε/√B is what its moves keep, and its `equation`; it is not on the scale of SGD's g.
    """

    @property
    def advised(self) -> AdamConfiguration | None:
        """The first move."""
        return self.moves[0].advised

    @property
    def safe(self) -> AdamConfiguration | None:
        """The largest part of the first move that no check fails; None where every part fails one."""
        return self.moves[0].safe


def advise_adam(
    configuration: AdamConfiguration,
    *,
    target_batch_size: int | None = None,
    target_learning_rate: float | None = None,
    target_momentum: float | None = None,
    target_dataset_size: int | None = None,
    gradient_noise_scale: float | None = None,
    ema_decay: float | None = None,
    name: str = "",
) -> AdamAdvice:
    """What the targets do to Adam's noise, what keeps it by the square-root rule, and how far to trust that.

    B → κB,   ε → ε√κ,   1-β → κ(1-β) for every β,   eps → eps/√κ

    Args:
        configuration: the present one; its learning rate is above 0.
        target_batch_size: B', examples per optimizer step; whole, at most a known dataset size.
        target_learning_rate: ε', above 0.
        target_momentum: must be None: Adam has betas, and the rule moves them.
        target_dataset_size: N'; whole. The rule does not depend on it, weight decay does.
        gradient_noise_scale: measured B_simple = tr Σ/‖G‖² in examples; NaN where it was not resolved.
        ema_decay: ρ in [0, 1) of an average of the weights, if there is one.
        name: copied into the advice.

    Returns:
        The advice. Outside the rule's domain `advised` is None, and its check "solution" says why.

    Raises:
        ValueError: naming the argument that is outside its domain, or if no target is given.

    Reference:
        Malladi et al., NeurIPS 2022, arXiv:2205.10287.
    """
    targets = Targets(target_batch_size, target_learning_rate, target_momentum, target_dataset_size)
    measured = Measurements(gradient_noise_scale, None, ema_decay)
    check_adam_targets(targets)
    positive("learning_rate", configuration.learning_rate)
    if configuration.dataset_size is not None:
        targets.check_against(configuration.dataset_size)
    moves = tuple(_bounded(configuration, targets, unknown, measured) for unknown in _unknowns(targets))
    reach = reach_note(configuration, targets, moves[0]) if len(moves) == 1 else None
    equation = (
        f"lr/sqrt(B) = {configuration.learning_rate:.6g}/sqrt({configuration.batch_size:.6g}) ="
        f" {configuration.noise_scale:.6g}"
    )
    unchanged = _unchanged(configuration, targets)
    notes = (
        *(() if reach is None else (reach,)),
        *_notes(configuration, targets, unchanged, moves),
    )
    return AdamAdvice(configuration, unchanged, moves, notes, equation, name, targets.given())


def check_adam_targets(targets: Targets) -> None:
    """Raises a ValueError for a momentum target, which means nothing to an optimizer without momentum."""
    if targets.momentum is not None:
        raise ValueError(
            "Expected argument `target_momentum` to be None for an Adam-like optimizer, but got"
            f" {targets.momentum!r}: it has running averages (betas), which Adam's rule moves with the"
            " batch size. Leave `target_momentum` out, and give a batch size or a learning rate as target."
        )


def _unknowns(targets: Targets) -> tuple[Unknown, ...]:
    # The dataset size does not enter the rule: as the only target it leaves everything as it is.
    if targets.batch_size is None and targets.learning_rate is None:
        return ("learning_rate",)
    return targets.unknowns()


def _unchanged(present: AdamConfiguration, targets: Targets) -> AdamConfiguration | None:
    batch_size = present.batch_size if targets.batch_size is None else targets.batch_size
    dataset_size = present.dataset_size if targets.dataset_size is None else targets.dataset_size
    if dataset_size is not None and batch_size > dataset_size:
        return None
    learning_rate = present.learning_rate if targets.learning_rate is None else targets.learning_rate
    return replace(present, learning_rate=learning_rate, batch_size=batch_size, dataset_size=dataset_size)


def _bounded(
    present: AdamConfiguration, targets: Targets, unknown: Unknown, measured: Measurements
) -> AdamMove:
    """The move, and how much of it no check fails."""
    move = _move(present, targets, unknown, measured)
    safe, limits = furthest(present, targets, lambda part: _move(present, part, unknown, measured))
    return replace(move, safe=safe.solution if isinstance(safe, AdamMove) else None, limited_by=limits)


def _move(present: AdamConfiguration, targets: Targets, unknown: Unknown, measured: Measurements) -> AdamMove:
    # A new size bounds the solved batch, not the old one.
    dataset_size = present.dataset_size if targets.dataset_size is None else targets.dataset_size
    start = replace(present, dataset_size=None)
    factor, result = _equations(start, targets, unknown)
    linear = _linear(start, targets, unknown, dataset_size)
    try:
        advised = _solution(start, targets, unknown, dataset_size)
    except NoSolutionError as error:
        alone = ""
        if unknown == "learning_rate":
            alone = f" The learning-rate part alone would be {result}, without betas to match it."
        return AdamMove(unknown, None, (factor,), linear, (no_solution(str(error) + alone),))
    eps = "eps sqrt(kappa)" if present.reduction == "sum" else "eps/sqrt(kappa)"
    why = (factor, f"sqrt: {result}", f"1 - beta' = kappa (1 - beta), eps' = {eps}")
    checks = tuple(adam_checks_of(present, advised, linear, unknown, measured))
    return AdamMove(unknown, advised, why, linear, checks)


def _equations(present: AdamConfiguration, targets: Targets, unknown: Unknown) -> tuple[str, str]:
    """κ and what follows from it, with their numbers."""
    old_lr, old_batch = present.learning_rate, present.batch_size
    if unknown == "learning_rate":
        new_batch = old_batch if targets.batch_size is None else targets.batch_size
        kappa = new_batch / old_batch
        return (
            f"kappa = B'/B = {new_batch:.6g}/{old_batch:.6g} = {kappa:.6g}",
            f"lr' = lr sqrt(kappa) = {old_lr:.6g} * sqrt({kappa:.6g}) = {old_lr * math.sqrt(kappa):.6g}",
        )
    new_lr = old_lr if targets.learning_rate is None else targets.learning_rate
    kappa = (new_lr / old_lr) * (new_lr / old_lr)
    return (
        f"kappa = (lr'/lr)^2 = ({new_lr:.6g}/{old_lr:.6g})^2 = {kappa:.6g}",
        f"B' = kappa B = {kappa:.6g} * {old_batch:.6g} = {kappa * old_batch:.6g}",
    )


def _solution(
    present: AdamConfiguration, targets: Targets, unknown: Unknown, dataset_size: int | None
) -> AdamConfiguration:
    if unknown == "learning_rate":
        advised = square_root_rule(present, batch_size=targets.batch_size)
    else:
        advised = square_root_rule(present, learning_rate=targets.learning_rate)
    if dataset_size is not None and advised.batch_size > dataset_size:
        raise NoSolutionError(
            f"A batch of {advised.batch_size:g} does not fit into a training set of {dataset_size}: a smaller"
            " `target_batch_size` is needed with it."
        )
    if advised.batch_size < 1:
        raise NoSolutionError(
            f"The square-root rule asks for a batch of {advised.batch_size:.3g}: a batch holds at least one"
            " example."
        )
    return replace(advised, dataset_size=dataset_size)


def _linear(
    present: AdamConfiguration, targets: Targets, unknown: Unknown, dataset_size: int | None
) -> AdamConfiguration | None:
    learning_rate, batch_size = present.learning_rate, present.batch_size
    if unknown == "learning_rate" and targets.batch_size is not None:
        learning_rate *= targets.batch_size / batch_size
        batch_size = targets.batch_size
    elif unknown == "batch_size" and targets.learning_rate is not None:
        batch_size *= targets.learning_rate / learning_rate
        learning_rate = targets.learning_rate
    if batch_size < 1 or (dataset_size is not None and batch_size > dataset_size):
        return None
    return replace(present, learning_rate=learning_rate, batch_size=batch_size, dataset_size=dataset_size)


def _notes(
    present: AdamConfiguration,
    targets: Targets,
    unchanged: AdamConfiguration | None,
    moves: tuple[AdamMove, ...],
) -> Iterator[str]:
    yield (
        "This is Adam's square-root rule (Malladi et al. 2022), not SGD's linear one: learning rate,"
        " betas and eps move together."
    )
    if present.reduction == "sum":
        yield (
            "The loss is a sum over the examples of a training_step: this optimizer's step does not depend on"
            " that, and of its settings only eps does; the eps advised is that of the sum, with as many accumulated"
            " batches and devices as now."
        )
    if len(moves) > 1 and unchanged is not None:
        yield (
            f"With both targets lr/sqrt(B) goes from {present.noise_scale:.6g} to"
            f" {unchanged.noise_scale:.6g}; the two moves are the single changes of a target that restore it."
        )
    if targets.dataset_size is not None and targets.dataset_size != present.dataset_size:
        yield (
            "The dataset size does not enter Adam's rule: it asks for no change of learning rate or batch size."
        )

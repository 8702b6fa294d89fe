"""Advice for Adam, RMSprop and their relatives: the square-root rule, its domain, and what it leaves out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning_bayes.functional._validation import positive
from lightning_bayes.functional.adam_scaling import AdamConfiguration, square_root_rule
from lightning_bayes.functional.caveats import large_batch, rounding
from lightning_bayes.functional.configuration import NoSolutionError, Targets, Unknown


@dataclass(frozen=True)
class AdamMove:
    """One way to keep the noise of Adam.

    Attributes:
        solved_for: "learning_rate" or "batch_size"; betas and eps move along with either.
        advised: the configuration by the square-root rule; None outside its domain (a caveat says why).
        why: the equation with its numbers put in.
    """

    solved_for: Unknown
    advised: AdamConfiguration | None
    why: tuple[str, ...]


@dataclass(frozen=True)
class AdamAdvice:
    """What to do about one parameter group of an Adam-like optimizer, as data.

    Attributes:
        present: the configuration as it is (under a schedule: at its peak learning rate).
        unchanged: the targets put in and nothing else changed; None if the batch would exceed the data.
        moves: the ways to keep the noise; two, of which one is to be taken, where both learning rate and
            batch size are targeted.
        caveats: everything that limits this advice, each a sentence.
        equation: the invariant ε/√B with its numbers put in.
        name: the parameter groups it is for, such as "Adam".
    """

    present: AdamConfiguration
    unchanged: AdamConfiguration | None
    moves: tuple[AdamMove, ...]
    caveats: tuple[str, ...]
    equation: str
    name: str = ""

    @property
    def advised(self) -> AdamConfiguration | None:
        """The first move."""
        return self.moves[0].advised

    @property
    def noise_scale_before(self) -> float:
        """The invariant ε/√B of the present configuration; not on the scale of SGD's g."""
        return self.present.noise_scale

    @property
    def noise_scale_unchanged(self) -> float | None:
        """The invariant ε/√B with the targets put in and nothing else changed."""
        return None if self.unchanged is None else self.unchanged.noise_scale

    @property
    def noise_scale_after(self) -> float | None:
        """The invariant ε/√B after the first move."""
        return None if self.advised is None else self.advised.noise_scale


def advise_adam(
    configuration: AdamConfiguration,
    *,
    target_batch_size: int | None = None,
    target_learning_rate: float | None = None,
    target_momentum: float | None = None,
    target_dataset_size: int | None = None,
    name: str = "",
) -> AdamAdvice:
    """What the targets do to Adam's noise, what keeps it by the square-root rule, and every caveat.

    B → κB,   ε → ε√κ,   1-β → κ(1-β) for every β,   eps → eps/√κ

    Args:
        configuration: the present one; its learning rate is above 0.
        target_batch_size: B', examples per optimizer step; whole, at most a known dataset size.
        target_learning_rate: ε', above 0.
        target_momentum: must be None: Adam has betas, and the rule moves them.
        target_dataset_size: N'; whole. The rule does not depend on it, weight decay does.
        name: copied into the advice.

    Returns:
        The advice. Outside the rule's domain `advised` is None, and a caveat says why.

    Raises:
        ValueError: naming the argument that is outside its domain, or if no target is given.

    Reference:
        Malladi et al., NeurIPS 2022, arXiv:2205.10287.
    """
    targets = Targets(target_batch_size, target_learning_rate, target_momentum, target_dataset_size)
    check_adam_targets(targets)
    positive("learning_rate", configuration.learning_rate)
    if configuration.dataset_size is not None:
        targets.check_against(configuration.dataset_size)
    start = configuration
    if targets.dataset_size is not None:
        # The new size bounds the solved batch, not the old one: it is put in with the solution.
        start = replace(start, dataset_size=None)
    solved = [_move(start, targets, unknown) for unknown in _unknowns(targets)]
    reasons = dict.fromkeys(reason for _, why_not in solved for reason in why_not)
    moves = tuple(move for move, _ in solved)
    equation = (
        f"lr/sqrt(B) = {start.learning_rate:.6g}/sqrt({start.batch_size:.6g}) = {start.noise_scale:.6g}"
    )
    unchanged = _unchanged(configuration, targets)
    caveats = (*reasons, *_caveats(configuration, targets, unchanged, moves))
    return AdamAdvice(configuration, unchanged, moves, caveats, equation, name)


def check_adam_targets(targets: Targets) -> None:
    """Raises a ValueError for a momentum target, which means nothing to an optimizer without momentum."""
    if targets.momentum is not None:
        raise ValueError(
            "Expected argument `target_momentum` to be None for an Adam-like optimizer, but got"
            f" {targets.momentum!r}: it has running averages (betas), which Adam's rule moves with the"
            " batch size."
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


def _move(present: AdamConfiguration, targets: Targets, unknown: Unknown) -> tuple[AdamMove, list[str]]:
    """The move, and the reason where the rule has no solution."""
    old_lr, old_batch = present.learning_rate, present.batch_size
    if unknown == "learning_rate":
        new_batch = old_batch if targets.batch_size is None else targets.batch_size
        kappa = new_batch / old_batch
        factor = f"kappa = B'/B = {new_batch:.6g}/{old_batch:.6g} = {kappa:.6g}"
        result = f"lr' = lr sqrt(kappa) = {old_lr:.6g} * sqrt({kappa:.6g}) = {old_lr * math.sqrt(kappa):.6g}"
    else:
        new_lr = old_lr if targets.learning_rate is None else targets.learning_rate
        kappa = (new_lr / old_lr) * (new_lr / old_lr)
        factor = f"kappa = (lr'/lr)^2 = ({new_lr:.6g}/{old_lr:.6g})^2 = {kappa:.6g}"
        result = f"B' = kappa B = {kappa:.6g} * {old_batch:.6g} = {kappa * old_batch:.6g}"
    try:
        advised = _solution(present, targets, unknown)
    except NoSolutionError as error:
        alone = f" The learning-rate part alone would be {result}, without betas to match it."
        return AdamMove(unknown, None, (factor,)), [
            str(error) + (alone if unknown == "learning_rate" else "")
        ]
    why = (factor, f"sqrt: {result}", "1 - beta' = kappa (1 - beta), eps' = eps/sqrt(kappa)")
    return AdamMove(unknown, advised, why), []


def _solution(present: AdamConfiguration, targets: Targets, unknown: Unknown) -> AdamConfiguration:
    if unknown == "learning_rate":
        advised = square_root_rule(present, batch_size=targets.batch_size)
    else:
        advised = square_root_rule(present, learning_rate=targets.learning_rate)
    dataset_size = present.dataset_size if targets.dataset_size is None else targets.dataset_size
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


def _caveats(
    present: AdamConfiguration,
    targets: Targets,
    unchanged: AdamConfiguration | None,
    moves: tuple[AdamMove, ...],
) -> Iterator[str]:
    yield (
        "This is Adam's square-root rule (Malladi et al. 2022), not SGD's linear one: learning rate,"
        " betas and eps move together. It is derived for Adam and RMSprop where the noise dominates the"
        " gradient."
    )
    if present.betas:
        yield (
            "It holds while kappa (1 - beta) < 1, here below a batch of"
            f" {present.largest_batch_size:.6g}; close to that the running averages forget within a"
            " step or two and the rule is an extrapolation."
        )
    if len(moves) > 1 and unchanged is not None:
        yield (
            f"With both targets lr/sqrt(B) goes from {present.noise_scale:.6g} to"
            f" {unchanged.noise_scale:.6g}; the two moves are the single changes of a target that restore it."
        )
    solutions = [move.advised for move in moves if move.advised is not None]
    law = (
        "the square-root rule takes the gradient's variance to fall as 1/B, which is so for B << N only (it"
        " falls as 1/B - 1/N), and is an extrapolation there"
    )
    yield from large_batch(present, solutions, law)
    for solution in solutions:
        yield from rounding(solution, "lr/sqrt(B)")
    advised = moves[0].advised
    if advised is not None and advised.learning_rate > present.learning_rate * (1 + 1e-9):
        yield (
            f"The learning rate grows {advised.learning_rate / present.learning_rate:.3g} times: keep"
            " or lengthen the warm-up."
        )
    if advised is not None and abs(advised.batch_size / present.batch_size - 1) > 1e-9:
        steps = present.batch_size / advised.batch_size
        yield (
            "Hold the number of epochs, not of steps: steps per epoch, and whatever is counted in steps"
            f" (schedule, warm-up, max_steps), are multiplied by {steps:.4g}. An average of the weights"
            f" with decay rho becomes rho^{1 / steps:.4g}."
        )
    yield from _decoupled_decay(present, moves)
    yield from _dataset_caveats(present, targets)


def _decoupled_decay(present: AdamConfiguration, moves: tuple[AdamMove, ...]) -> Iterator[str]:
    # Each step shrinks the weights by ε wd, an epoch of N/B steps by ε wd N/B. The rule makes of it
    # (ε √κ) wd N/(κ B) = (ε wd N/B)/√κ, so wd √κ keeps it; in the SDE, whose time is ε² a step, likewise.
    for move in moves:
        if move.advised is None:
            continue
        root = math.sqrt(move.advised.batch_size / present.batch_size)
        if abs(root - 1) <= 1e-9:
            continue
        which = f" with the new {move.solved_for.replace('_', ' ')}" if len(moves) > 1 else ""
        yield (
            "Decoupled weight decay (AdamW) shrinks the weights by lr * weight_decay * N/B an epoch, which"
            f" the rule divides by sqrt(kappa): to keep it{which}, multiply weight_decay by sqrt(kappa) ="
            f" {root:.6g}. An L2 penalty inside the gradient (Adam) needs no change."
        )


def _dataset_caveats(present: AdamConfiguration, targets: Targets) -> Iterator[str]:
    if targets.dataset_size is None or targets.dataset_size == present.dataset_size:
        return
    yield "The dataset size does not enter Adam's rule: it asks for no change of learning rate or batch size."
    if present.dataset_size is not None:
        ratio = present.dataset_size / targets.dataset_size
        yield (
            "Weight decay is about a prior of precision N * weight_decay: to keep it, multiply"
            f" weight_decay by N/N' = {present.dataset_size}/{targets.dataset_size} = {ratio:.6g}."
        )

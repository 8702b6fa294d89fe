"""Rules of rescaling: the learning rate or batch size that keeps the noise of SGD, and of Adam."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from lightning_bayes.functional._validation import ROUNDING, count, positive
from lightning_bayes.functional.configuration import (
    AdamConfiguration,
    Configuration,
    Goal,
    NoSolutionError,
    Targets,
    Unknown,
)
from lightning_bayes.functional.noise_scale import (
    batch_size_for_noise_scale,
    momentum_factor,
    steady_state_noise_scale,
)
from lightning_bayes.functional.summed_loss import summed_batch_size

Rule = Literal["exact", "linear", "sqrt"]


def rescale(
    *,
    learning_rate: float,
    batch_size: int,
    dataset_size: int,
    momentum: float = 0.0,
    dampening: float = 0.0,
    target_batch_size: int | None = None,
    target_learning_rate: float | None = None,
    target_momentum: float | None = None,
    target_dataset_size: int | None = None,
    rule: Rule = "exact",
    solve_for: Unknown | None = None,
) -> Configuration:
    """The configuration that reaches the targets and keeps the noise scale of the present one.

    exact:   g = ε (N/B - 1) (1 - τ) / (1 - m) stays
    linear:  B ∝ ε N (1 - τ) / (1 - m), its limit for B ≪ N
    sqrt:    ε ∝ √B, the learning-rate part of Adam's rule (`rescale_adam` moves betas and eps too)

    Args:
        learning_rate: ε on the mean loss; above 0.
        batch_size: B, examples per optimizer step (loader batch x accumulation x replicas); whole, at most N.
        dataset_size: N, training examples; whole.
        momentum: m, in [0, 1).
        dampening: τ, in [0, 1).
        target_batch_size: B'; the learning rate follows.
        target_learning_rate: ε'; the batch size follows.
        target_momentum: m', in [0, 1).
        target_dataset_size: N'; whole.
        rule: "exact", "linear" or "sqrt".
        solve_for: "learning_rate" or "batch_size". By default the partner of the given one; the learning rate
            when neither is given.

    Returns:
        The new configuration. A solved batch size is not rounded and can be below 1.

    Raises:
        ValueError: naming the argument that is outside its domain; if no target is given; if batch size and
            learning rate both are (nothing is left to solve for).
        NoSolutionError: a ValueError, where the rule has no solution: at full batch, or for a linear batch
            size larger than the training set.

    Reference:
        Smith & Le, ICLR 2018, arXiv:1710.06451, section 5; for "sqrt" Malladi et al., NeurIPS 2022,
        arXiv:2205.10287.
    """
    present = Configuration(
        positive("learning_rate", learning_rate),
        count("batch_size", batch_size),
        count("dataset_size", dataset_size),
        momentum,
        dampening,
    )
    targets = Targets(target_batch_size, target_learning_rate, target_momentum, target_dataset_size)
    targets.check_against(present.dataset_size)
    return solve(present, targets, _unknown(targets, solve_for), rule)


def solve(present: Configuration, targets: Targets, unknown: Unknown, rule: Rule) -> Configuration:
    """`rescale` for values already gathered; a target for the unknown itself is disregarded.

    Args:
        present: the configuration whose noise scale is kept; its learning rate is above 0. With a summed loss both
            it and the new one are of the sum over the examples of one training_step, with as many averaged batches.
        targets: what changes.
        unknown: "learning_rate" or "batch_size".
        rule: "exact", "linear" or "sqrt".

    Returns:
        The new configuration.

    Raises:
        ValueError: as `rescale` does.
    """
    rules = {"exact": _exact, "linear": _linear, "sqrt": _sqrt}
    if not isinstance(rule, str) or rule not in rules:
        raise ValueError(f'Expected argument `rule` to be "exact", "linear" or "sqrt", but got {rule!r}.')
    positive("learning_rate", present.learning_rate)
    values = targets.fixed(present)
    goal = Goal(**values)
    if unknown == "learning_rate" and goal.batch_size > goal.dataset_size:
        raise NoSolutionError(
            f"The present batch of {goal.batch_size:g} does not fit into a training set of"
            f" {goal.dataset_size}: a smaller `target_batch_size` is needed with it."
        )
    if rule == "sqrt" and (targets.momentum is not None or targets.dataset_size is not None):
        raise ValueError(
            'Expected no `target_momentum` and no `target_dataset_size` with `rule="sqrt"`, which relates'
            f" learning rate and batch size only, but got {targets.momentum!r} and {targets.dataset_size!r}."
        )
    if unknown == "batch_size" and present.reduction == "sum":
        return Configuration(**values | {unknown: summed_batch_size(present, goal, rule)})
    value = rules[rule](present, goal, unknown)
    if unknown == "learning_rate":
        # The rules are of the mean loss; the learning rate of a sum over b examples makes b times its steps.
        value /= goal.summed_examples
    return Configuration(**values | {unknown: value})


def _unknown(targets: Targets, solve_for: Unknown | None) -> Unknown:
    possible = targets.unknowns()
    if targets.batch_size is not None and targets.learning_rate is not None:
        raise ValueError(
            "Expected one of `target_batch_size` and `target_learning_rate` to be None, so that it can be"
            f" solved for, but got {targets.batch_size!r} and {targets.learning_rate!r}."
            " `advise` says what both do."
        )
    if solve_for is None:
        return possible[0]
    if solve_for not in possible:
        raise ValueError(
            f"Expected argument `solve_for` to be one of {possible} with these targets,"
            f" but got {solve_for!r}."
        )
    return solve_for


def _exact(present: Configuration, goal: Goal, unknown: Unknown) -> float:
    scale = present.noise_scale
    if unknown == "batch_size":
        return batch_size_for_noise_scale(
            scale, goal.learning_rate, goal.dataset_size, goal.momentum, goal.dampening
        )
    if scale == 0:
        raise NoSolutionError(
            f"The present run is full batch ({present.batch_size:g} of {present.dataset_size}): its"
            " noise scale is 0, which at a smaller batch only a learning rate of 0 has."
        )
    if goal.batch_size == goal.dataset_size:
        raise NoSolutionError(
            f"A batch of {goal.batch_size:g} is the whole training set of {goal.dataset_size}: its"
            " noise scale is 0 at every learning rate, so none keeps the present one."
        )
    factor = momentum_factor(goal.momentum, goal.dampening)
    return scale / steady_state_noise_scale(1.0, goal.batch_size, goal.dataset_size, factor)


def _linear(present: Configuration, goal: Goal, unknown: Unknown) -> float:
    # ε N (1 - τ) / (B (1 - m)) stays, written as ratios, so that what does not change cancels exactly.
    factor = momentum_factor(goal.momentum, goal.dampening) / momentum_factor(
        present.momentum, present.dampening
    )
    data = goal.dataset_size / present.dataset_size
    if unknown == "learning_rate":
        return present.mean_learning_rate * (goal.batch_size / present.batch_size) / (data * factor)
    batch_size = present.batch_size * (goal.learning_rate / present.learning_rate) * data * factor
    if batch_size > goal.dataset_size:
        raise NoSolutionError(
            f"The linear rule asks for a batch of {batch_size:g} examples, more than the training set of"
            f" {goal.dataset_size}: it is outside its validity."
        )
    return batch_size


def _sqrt(present: Configuration, goal: Goal, unknown: Unknown) -> float:
    adam = AdamConfiguration(
        present.mean_learning_rate, present.batch_size, betas=(), eps=0.0, dataset_size=present.dataset_size
    )
    if unknown == "learning_rate":
        return square_root_rule(adam, batch_size=goal.batch_size).learning_rate
    return square_root_rule(adam, learning_rate=goal.learning_rate).batch_size


def rescale_adam(
    *,
    learning_rate: float,
    batch_size: int,
    target_batch_size: int | None = None,
    target_learning_rate: float | None = None,
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    dataset_size: int | None = None,
) -> AdamConfiguration:
    """The configuration of Adam or RMSprop that follows the same SDE at another batch size.

    B → κB,   ε → ε√κ,   1-β → κ(1-β) for every β,   eps → eps/√κ

    Args:
        learning_rate: ε, above 0.
        batch_size: B, examples per optimizer step; whole.
        target_batch_size: B', so that κ = B'/B. Give this one or `target_learning_rate`.
        target_learning_rate: ε', so that κ = (ε'/ε)².
        betas: every decay rate, each in [0, 1): (β1, β2) of Adam, (alpha,) of RMSprop.
        eps: the constant beside the root mean square, at least 0.
        dataset_size: N if known; only bounds the batch size.

    Returns:
        The new configuration. A solved batch size is not rounded.

    Raises:
        ValueError: naming the argument that is outside its domain; unless exactly one target is given.
        NoSolutionError: a ValueError, if κ(1-β) >= 1 for some β, where the rule has left its domain, or if
            the batch exceeds a known training set.

    Reference:
        Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, NeurIPS 2022,
        arXiv:2205.10287.
    """
    positive("learning_rate", learning_rate)
    present = AdamConfiguration(learning_rate, count("batch_size", batch_size), betas, eps, dataset_size)
    if (target_batch_size is None) == (target_learning_rate is None):
        raise ValueError(
            "Expected exactly one of `target_batch_size` and `target_learning_rate`, but got"
            f" {target_batch_size!r} and {target_learning_rate!r}."
        )
    if target_batch_size is not None:
        return square_root_rule(present, batch_size=count("target_batch_size", target_batch_size))
    return square_root_rule(present, learning_rate=positive("target_learning_rate", target_learning_rate))


def square_root_rule(
    present: AdamConfiguration, *, batch_size: float | None = None, learning_rate: float | None = None
) -> AdamConfiguration:
    """Adam's square-root rule, as `rescale_adam` documents it, for arguments already checked.

    B → κB,   ε → ε√κ,   1-β → κ(1-β) for every β,   eps → eps/√κ

    Args:
        present: the configuration to start from; its learning rate is above 0. For a summed loss, whose gradient is
            b times that of the mean, eps is b times as large too: eps → eps √κ with as many averaged batches.
        batch_size: B', so that κ = B'/B.
        learning_rate: ε', so that κ = (ε'/ε)², in place of `batch_size`. Without either κ is 1.

    Returns:
        The new configuration.

    Raises:
        NoSolutionError: if κ(1-β) >= 1 for some β, or the batch exceeds a known training set.
    """
    # A target is taken as it is: B · (B'/B) and ε √κ can miss it by a rounding.
    if learning_rate is None:
        batch_size = present.batch_size if batch_size is None else batch_size
        kappa = batch_size / present.batch_size
        learning_rate = present.learning_rate * math.sqrt(kappa)
    else:
        ratio = learning_rate / present.learning_rate
        kappa = ratio * ratio
        batch_size = kappa * present.batch_size
    if present.dataset_size is not None and batch_size > present.dataset_size:
        raise NoSolutionError(
            f"The square-root rule asks for a batch of {batch_size:g} examples, more than the training set of"
            f" {present.dataset_size}."
        )
    if batch_size >= present.largest_batch_size * (1 - ROUNDING):  # 1 - 0.9 is not quite 0.1
        raise NoSolutionError(
            f"The square-root rule holds while kappa (1 - beta) < 1: from beta = {min(present.betas):g} below"
            f" a batch of {present.largest_batch_size:g}, but kappa = {kappa:g} asks for"
            f" {batch_size:g}. Use a smaller batch, or a beta closer to 1."
        )
    return replace(
        present,
        learning_rate=learning_rate,
        batch_size=batch_size,
        betas=tuple(1 - kappa * (1 - beta) for beta in present.betas),
        eps=present.eps * math.sqrt(kappa) if present.reduction == "sum" else present.eps / math.sqrt(kappa),
    )

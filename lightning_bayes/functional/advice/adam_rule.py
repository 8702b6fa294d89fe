"""What keeps the noise of Adam, RMSprop and their relatives: the square-root rule, and its domain.

Malladi et al., NeurIPS 2022, arXiv:2205.10287.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from lightning_bayes.functional._validation import ROUNDING
from lightning_bayes.functional.advice.advice import Move
from lightning_bayes.functional.advice.checks import (
    NOTICEABLE,
    Case,
    gradient_noise,
    small_batches,
    warm_up,
    weight_decay,
    weight_ema,
    whole_batch,
)
from lightning_bayes.functional.advice.rule import Rule
from lightning_bayes.functional.check import Check
from lightning_bayes.functional.configuration import AdamConfiguration, NoSolutionError, Targets, Unknown
from lightning_bayes.functional.scaling import square_root_rule


def _unknowns(targets: Targets) -> tuple[Unknown, ...]:
    # The dataset size does not enter the rule: as the only target it leaves everything as it is.
    if targets.batch_size is None and targets.learning_rate is None:
        return ("learning_rate",)
    return targets.unknowns()


def _square_root(present: AdamConfiguration, targets: Targets, unknown: Unknown) -> AdamConfiguration:
    examples = targets.fixed(present)["dataset_size"]
    # A new size bounds the solved batch, not the old one.
    start = replace(present, dataset_size=None)
    try:
        if unknown == "learning_rate":
            advised = square_root_rule(start, batch_size=targets.batch_size)
        else:
            advised = square_root_rule(start, learning_rate=targets.learning_rate)
        if examples is not None and advised.batch_size > examples:
            raise NoSolutionError(
                f"A batch of {advised.batch_size:g} does not fit into a training set of {examples}: a smaller"
                " `target_batch_size` is needed with it."
            )
    except NoSolutionError as error:
        if unknown == "batch_size":
            raise
        alone = f"The learning-rate part alone would be {_equations(present, targets, unknown)[1]}"
        raise NoSolutionError(f"{error} {alone}, without betas to match it.") from error
    return replace(advised, dataset_size=examples)


def _linear(present: AdamConfiguration, targets: Targets, unknown: Unknown) -> AdamConfiguration | None:
    values = targets.fixed(present)
    if unknown == "learning_rate":
        values["learning_rate"] = present.learning_rate * (values["batch_size"] / present.batch_size)
    else:
        values["batch_size"] = present.batch_size * (values["learning_rate"] / present.learning_rate)
    fits = values["dataset_size"] is None or values["batch_size"] <= values["dataset_size"]
    return AdamConfiguration(**values) if fits and values["batch_size"] >= 1 else None


def _equation(present: AdamConfiguration) -> str:
    return (
        f"lr/sqrt(B) = {present.learning_rate:.6g}/sqrt({present.batch_size:.6g}) = {present.noise_scale:.6g}"
    )


def _equations(present: AdamConfiguration, targets: Targets, unknown: Unknown) -> tuple[str, str]:
    """κ and what follows from it, with their numbers."""
    values, old_lr, old_batch = targets.fixed(present), present.learning_rate, present.batch_size
    new_lr, new_batch = values["learning_rate"], values["batch_size"]
    if unknown == "learning_rate":
        kappa = new_batch / old_batch
        return (
            f"kappa = B'/B = {new_batch:.6g}/{old_batch:.6g} = {kappa:.6g}",
            f"lr' = lr sqrt(kappa) = {old_lr:.6g} * sqrt({kappa:.6g}) = {old_lr * math.sqrt(kappa):.6g}",
        )
    kappa = (new_lr / old_lr) * (new_lr / old_lr)
    return (
        f"kappa = (lr'/lr)^2 = ({new_lr:.6g}/{old_lr:.6g})^2 = {kappa:.6g}",
        f"B' = kappa B = {kappa:.6g} * {old_batch:.6g} = {kappa * old_batch:.6g}",
    )


def _why(present: AdamConfiguration, targets: Targets, move: Move[AdamConfiguration]) -> Iterator[str]:
    factor, result = _equations(present, targets, move.solved_for)
    yield factor
    if move.advised is not None:
        eps = "eps sqrt(kappa)" if present.reduction == "sum" else "eps/sqrt(kappa)"
        yield f"sqrt: {result}"
        yield f"1 - beta' = kappa (1 - beta), eps' = {eps}"


def _notes(
    present: AdamConfiguration,
    targets: Targets,
    unchanged: AdamConfiguration | None,
    moves: tuple[Move[AdamConfiguration], ...],
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


def _domain(case: Case[AdamConfiguration]) -> Iterator[Check]:
    """κ(1-β) against 1, for the smallest β; of optimizers that have one."""
    present = case.present
    if not present.betas:
        return
    value = (case.advised.batch_size / present.batch_size) * (1 - min(present.betas))
    passed = value < 1 - ROUNDING
    sentence = (
        "The square-root rule holds while kappa (1 - beta) < 1, here below a batch of"
        f" {present.largest_batch_size:.6g}; it is {value:.4g}."
    )
    if passed:
        sentence += " Close to 1 the running averages forget within a step or two."
    yield Check("adam_domain", passed, value, 1.0, sentence)


def _rules_agree(case: Case[AdamConfiguration]) -> Iterator[Check]:
    """Square root against linear: which of them holds depends on whether noise dominates the gradient."""
    if case.linear is None:
        return
    value, other = getattr(case.advised, case.unknown), getattr(case.linear, case.unknown)
    difference, name = other / value - 1, case.unknown.replace("_", " ")
    if abs(difference) <= NOTICEABLE:
        yield Check("rules_agree", True, difference, NOTICEABLE, f"Both rules ask for the same {name}.")
        return
    larger, limit = max(case.present.batch_size, case.advised.batch_size), case.measured.gradient_noise_scale
    sentence = (
        f"The rules differ: the square root asks for a {name} of {value:.4g}, SGD's linear rule for {other:.4g}"
        f" (range {min(value, other):.4g} to {max(value, other):.4g}). The square root keeps the trajectory of Adam"
        " where the noise dominates the gradient, B << B_simple"
    )
    if limit is None or math.isnan(limit):
        yield Check("rules_agree", None, larger, None, f"{sentence}; B_simple is not measured here.")
        return
    sentence += f" = {limit:.4g}, which is {'so' if larger <= limit else 'not so'} here."
    if larger > limit:
        sentence += (
            " To keep the trajectory try the range; the learning rate that reaches"
            " a loss in the fewest steps is another question: for optimizers that step by the sign of the gradient it"
            " is largest at a batch of about B_simple and falls beyond it (Li et al. 2024)."
        )
    yield Check("rules_agree", larger <= limit, larger, limit, sentence)


def _epochs(case: Case[AdamConfiguration]) -> Iterator[Check]:
    """The rule keeps the number of epochs."""
    steps = case.present.batch_size / case.advised.batch_size
    if abs(steps - 1) <= 1e-9:
        yield Check("epochs", True, 1.0, 1.0, "The number of epochs stays, and of steps.", action=True)
        return
    sentence = (
        "Hold the number of epochs, not of steps: steps per epoch, and whatever is counted in steps (schedule,"
        f" warm-up, max_steps), are multiplied by {steps:.4g}."
    )
    yield Check("epochs", False, steps, 1.0, sentence, action=True)


def _decoupled_decay(case: Case[AdamConfiguration]) -> Iterator[Check]:
    """What keeps AdamW's decay of the weights."""
    # Each step shrinks the weights by ε wd, an epoch of N/B steps by ε wd N/B. The rule makes of it
    # (ε √κ) wd N/(κ B) = (ε wd N/B)/√κ, so wd √κ keeps it; in the SDE, whose time is ε² a step, too.
    root = math.sqrt(case.advised.batch_size / case.present.batch_size)
    if abs(root - 1) <= 1e-9:
        return
    sentence = (
        "Decoupled weight decay (AdamW) shrinks the weights by lr * weight_decay * N/B an epoch, which the rule"
        f" divides by sqrt(kappa): to keep it, multiply weight_decay by sqrt(kappa) = {root:.6g}."
    )
    if case.present.reduction == "mean":
        sentence += " An L2 penalty inside the gradient (Adam) needs no change."
    yield Check("decoupled_weight_decay", False, root, 1.0, sentence, action=True)


ADAM = Rule(
    _unknowns,
    "square-root",
    _square_root,
    _linear,
    _equation,
    _why,
    _notes,
    checks=(
        _domain,
        _rules_agree,
        small_batches,
        gradient_noise,
        warm_up,
        whole_batch,
        _epochs,
        weight_ema,
        _decoupled_decay,
        weight_decay,
    ),
)

"""What advice for Adam-like optimizers is held against: one function a check."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_bayes.functional._validation import ROUNDING
from lightning_bayes.functional.adam_scaling import AdamConfiguration
from lightning_bayes.functional.advice.common_checks import (
    NOTICEABLE,
    gradient_noise,
    small_batches,
    weight_decay,
    weight_ema,
    whole_batch,
)
from lightning_bayes.functional.check import Check, Measurements
from lightning_bayes.functional.configuration import Unknown

LAW = (
    "the square-root rule takes the gradient's variance to fall as 1/B, which is so for B << N only (it falls as"
    " 1/B - 1/N), and is an extrapolation there"
)


def adam_checks_of(
    present: AdamConfiguration,
    advised: AdamConfiguration,
    linear: AdamConfiguration | None,
    unknown: Unknown,
    measured: Measurements,
) -> Iterator[Check]:
    """Every check of one move of Adam, then what is to be done with it.

    Args:
        present: the configuration whose noise is kept.
        advised: the one by the square-root rule.
        linear: the one by the linear rule of common practice; None where it leaves the training set.
        unknown: what was solved for.
        measured: gradient noise, where it was measured. The curvature that bounds Adam's learning rate is
            that of its preconditioned loss, which is not measured.

    Yields:
        The checks, reasons to doubt first.
    """
    if present.betas:
        yield adam_domain(present, advised.batch_size)
    yield from _rules(present, advised, linear, unknown, measured)
    yield from small_batches(present, advised, LAW)
    yield from gradient_noise(present, advised, measured)
    yield _warm_up(present, advised)
    yield from whole_batch(advised, "lr/sqrt(B)")
    yield _epochs(present, advised)
    yield from weight_ema(present, advised, measured)
    yield from _decoupled_decay(present, advised)
    yield from weight_decay(present, advised)


def adam_domain(present: AdamConfiguration, batch_size: float) -> Check:
    """κ(1-β) against 1, for the smallest β; called for optimizers that have one."""
    value = (batch_size / present.batch_size) * (1 - min(present.betas))
    passed = value < 1 - ROUNDING
    sentence = (
        "The square-root rule holds while kappa (1 - beta) < 1, here below a batch of"
        f" {present.largest_batch_size:.6g}; it is {value:.4g}."
    )
    if passed:
        sentence += " Close to 1 the running averages forget within a step or two."
    return Check("adam_domain", passed, value, 1.0, sentence)


def _rules(
    present: AdamConfiguration,
    advised: AdamConfiguration,
    linear: AdamConfiguration | None,
    unknown: Unknown,
    measured: Measurements,
) -> Iterator[Check]:
    """Square root against linear: which of them holds depends on whether noise dominates the gradient."""
    if linear is None:
        return
    value, other = getattr(advised, unknown), getattr(linear, unknown)
    difference = other / value - 1
    limit = measured.resolved_noise_scale
    name = unknown.replace("_", " ")
    if abs(difference) <= NOTICEABLE:
        yield Check("rules_agree", True, difference, NOTICEABLE, f"Both rules ask for the same {name}.")
        return
    low, high = sorted((value, other))
    larger = max(present.batch_size, advised.batch_size)
    sentence = (
        f"The rules differ: the square root asks for a {name} of {value:.4g}, SGD's linear rule for {other:.4g}"
        f" (range {low:.4g} to {high:.4g}). The square root keeps the trajectory of Adam where the noise dominates"
        " the gradient, B << B_simple"
    )
    if limit is None:
        yield Check("rules_agree", None, larger, None, f"{sentence}; B_simple is not measured here.")
        return
    passed = larger <= limit
    if passed:
        yield Check("rules_agree", True, larger, limit, f"{sentence} = {limit:.4g}, which is so here.")
        return
    sentence += (
        f" = {limit:.4g}, which is not so here. To keep the trajectory try the range; the learning rate that reaches"
        " a loss in the fewest steps is another question: for optimizers that step by the sign of the gradient it is"
        " largest at a batch of about B_simple and falls beyond it (Li et al. 2024)."
    )
    yield Check("rules_agree", False, larger, limit, sentence)


def _warm_up(present: AdamConfiguration, advised: AdamConfiguration) -> Check:
    ratio = advised.learning_rate / present.learning_rate
    if ratio <= 1 + 1e-9:
        return Check("warm_up", True, ratio, 1.0, "The learning rate does not grow: no warm-up.", action=True)
    sentence = f"The learning rate grows {ratio:.3g} times: keep or lengthen the warm-up."
    return Check("warm_up", False, ratio, 1.0, sentence, action=True)


def _epochs(present: AdamConfiguration, advised: AdamConfiguration) -> Check:
    steps = present.batch_size / advised.batch_size
    if abs(steps - 1) <= 1e-9:
        return Check("epochs", True, 1.0, 1.0, "The number of epochs stays, and of steps.", action=True)
    sentence = (
        "Hold the number of epochs, not of steps: steps per epoch, and whatever is counted in steps (schedule,"
        f" warm-up, max_steps), are multiplied by {steps:.4g}."
    )
    return Check("epochs", False, steps, 1.0, sentence, action=True)


def _decoupled_decay(present: AdamConfiguration, advised: AdamConfiguration) -> Iterator[Check]:
    # Each step shrinks the weights by ε wd, an epoch of N/B steps by ε wd N/B. The rule makes of it
    # (ε √κ) wd N/(κ B) = (ε wd N/B)/√κ, so wd √κ keeps it; in the SDE, whose time is ε² a step, too.
    root = math.sqrt(advised.batch_size / present.batch_size)
    if abs(root - 1) <= 1e-9:
        return
    yield Check(
        "decoupled_weight_decay",
        False,
        root,
        1.0,
        "Decoupled weight decay (AdamW) shrinks the weights by lr * weight_decay * N/B an epoch, which the rule"
        f" divides by sqrt(kappa): to keep it, multiply weight_decay by sqrt(kappa) = {root:.6g}."
        + (
            "" if present.reduction == "sum" else " An L2 penalty inside the gradient (Adam) needs no change."
        ),
        action=True,
    )

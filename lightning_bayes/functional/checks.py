"""What advice for SGD is held against: one function a check, shared ones with Adam's first.

A check that passes says so too: a table shows those that do not, the data hold them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from lightning_bayes.functional.adam_scaling import AdamConfiguration
from lightning_bayes.functional.check import Check, Measurements
from lightning_bayes.functional.configuration import Configuration, Unknown
from lightning_bayes.functional.stability import stability_edge, variance_inflation

AnyConfiguration = TypeVar("AnyConfiguration", Configuration, AdamConfiguration)

# Below this relative difference two values are the same in practice, and nothing is to be done.
NOTICEABLE = 0.01
# The share of the training set above which a batch is no longer "B << N"; there the rules differ by as much.
LARGE_SHARE = 0.1
# The stationary variance beyond the SDE's up to which g is still the whole story.
LARGEST_VARIANCE = 1.1


def checks_of(
    present: Configuration,
    exact: Configuration,
    linear: Configuration | None,
    unknown: Unknown,
    measured: Measurements,
) -> Iterator[Check]:
    """Every check of one move of SGD, then what is to be done with it.

    Args:
        present: the configuration whose noise scale is kept.
        exact: the advised one.
        linear: the same by the linear rule; None where that leaves the training set.
        unknown: what was solved for.
        measured: curvature and gradient noise, where they were measured.

    Yields:
        The checks, reasons to doubt first.
    """
    if linear is not None:
        yield _rules_agree(exact, linear, unknown)
    law = "a constant noise scale is a law of B << N, and even the exact formula is an extrapolation there"
    yield from small_batches(present, exact, law)
    yield from gradient_noise(present, exact, measured)
    yield from _stability(present, exact, measured)
    yield _warm_up(present, exact)
    yield from whole_batch(exact, "the noise scale")
    yield from _epochs_and_steps(present, exact)
    yield from weight_ema(present, exact, measured)
    yield from weight_decay(present.dataset_size, exact.dataset_size)


def small_batches(
    present: AnyConfiguration, solution: AnyConfiguration, law: str, limit: float = LARGE_SHARE
) -> Iterator[Check]:
    """B and B' against N/10, above which no rule is derived.

    Args:
        present: the configuration whose noise is kept.
        solution: the advised one.
        law: why the rule does not reach so far, as the second half of a sentence.
        limit: the share of the training set.

    Yields:
        A check each, where the size of the training set is known.
    """
    for name, case, configuration in [
        ("present_batch_size", "present", present),
        ("batch_size", "advised", solution),
    ]:
        batch_size, dataset_size = configuration.batch_size, configuration.dataset_size
        if dataset_size is None:
            continue
        most = limit * dataset_size
        passed = batch_size <= most
        sentence = f"The {case} batch of {batch_size:.6g} is within N/10 = {most:.6g}."
        if not passed:
            sentence = f"The {case} batch of {batch_size:.6g} is above N/10 = {most:.6g}: {law}."
        if batch_size == dataset_size:
            sentence += (
                f" The {case} batch is the whole training set: its gradient has no sampling noise, at any"
                " learning rate."
            )
        yield Check(name, passed, batch_size, most, sentence)


def gradient_noise(
    present: AnyConfiguration, solution: AnyConfiguration, measured: Measurements
) -> Iterator[Check]:
    """B' against B_simple, beyond which a larger batch saves few steps; only where the batch grows."""
    if solution.batch_size <= present.batch_size:
        return
    name, limit = "gradient_noise_scale", measured.resolved_noise_scale
    if limit is None:
        why = "is not measured here (`GradientNoiseScale` does)"
        if measured.gradient_noise_scale is not None:
            why = "was measured and not resolved: its mean gradient is lost in the noise"
        yield Check(
            name,
            None,
            solution.batch_size,
            None,
            "A larger batch saves steps only while it is below the noise scale of the gradient itself, B_simple"
            f" (McCandlish et al. 2018), which {why}.",
        )
        return
    passed = solution.batch_size <= limit
    sentence = (
        f"The batch of {solution.batch_size:.6g} is within the gradient noise scale B_simple = {limit:.4g}."
    )
    if not passed:
        # McCandlish et al., eq. 2.7: steps S = S_min (1 + B_simple/B), examples E = E_min (1 + B/B_simple).
        examples = (1 + solution.batch_size / limit) / (1 + present.batch_size / limit)
        sentence = (
            f"The batch of {solution.batch_size:.6g} is above the gradient noise scale B_simple = {limit:.4g}: it"
            f" saves few steps, and takes about {examples:.3g} times the examples of the present batch to the"
            " same loss (McCandlish et al. 2018)."
        )
    yield Check(name, passed, solution.batch_size, limit, sentence)


def whole_batch(solution: AnyConfiguration, quantity: str) -> Iterator[Check]:
    """What a solved batch size that is no whole number costs; `quantity` is what its `noise_scale` is called."""
    whole = max(1, math.floor(solution.batch_size + 0.5))
    if abs(whole - solution.batch_size) > 1e-9 * whole:
        rounded = replace(solution, batch_size=whole)
        yield Check(
            "whole_batch",
            False,
            solution.batch_size,
            whole,
            f"A batch of {solution.batch_size:.6g} has to be a whole number: with {whole} {quantity} is"
            f" {rounded.noise_scale:.6g} in place of {solution.noise_scale:.6g}.",
            action=True,
        )


def weight_ema(
    present: AnyConfiguration, solution: AnyConfiguration, measured: Measurements
) -> Iterator[Check]:
    """An average of the weights, ρ -> ρ^κ, so that it spans the same part of an epoch."""
    # κ is the ratio of steps per epoch. With the data as they are that is B'/B (Busbridge et al. 2023); with
    # more data both rules keep the training time of a step times N, and so the same ratio.
    kappa = solution.batch_size / present.batch_size
    if present.dataset_size is not None and solution.dataset_size is not None:
        kappa *= present.dataset_size / solution.dataset_size
    rho = measured.ema_decay
    if abs(kappa - 1) <= 1e-9:
        yield Check("weight_ema", True, rho, rho, "An average of the weights keeps its decay.", action=True)
    elif rho is None:
        yield Check(
            "weight_ema",
            False,
            kappa,
            None,
            f"An average of the weights with decay rho becomes rho^{kappa:.4g}.",
            action=True,
        )
    else:
        yield Check(
            "weight_ema",
            False,
            rho,
            rho**kappa,
            f"The average of the weights: decay {rho:g} becomes {rho:g}^{kappa:.4g} = {rho**kappa:.6g}.",
            action=True,
        )


def weight_decay(before: int | None, after: int | None) -> Iterator[Check]:
    """The prior that an L2 penalty is, where the number of examples N changes."""
    if before is None or after is None or before == after:
        return
    yield Check(
        "weight_decay",
        False,
        before / after,
        1.0,
        "An L2 penalty is a prior of precision N * weight_decay: to keep it, multiply weight_decay"
        f" by N/N' = {before}/{after} = {before / after:.6g}.",
        action=True,
    )


def _rules_agree(exact: Configuration, linear: Configuration, unknown: Unknown) -> Check:
    value, other = getattr(exact, unknown), getattr(linear, unknown)
    difference = other / value - 1
    low, high = sorted((value, other))
    name = unknown.replace("_", " ")
    sentence = f"The exact and the linear rule agree on the {name} within {max(abs(difference), 1e-4):.2%}."
    if abs(difference) > NOTICEABLE:
        sentence = (
            f"The rules differ: the linear rule's {name} is {abs(difference):.0%}"
            f" {'above' if difference > 0 else 'below'} the exact one, because of the -1 in N/B - 1, which it"
            f" drops. The range is {low:.4g} to {high:.4g}."
        )
    return Check("rules_agree", abs(difference) <= LARGE_SHARE, difference, LARGE_SHARE, sentence)


def _stability(present: Configuration, exact: Configuration, measured: Measurements) -> Iterator[Check]:
    h, rate = measured.largest_eigenvalue, exact.learning_rate
    edge = stability_edge(exact.momentum, exact.dampening, nesterov=exact.nesterov)
    if h is None:
        before = stability_edge(present.momentum, present.dampening, nesterov=present.nesterov)
        if rate / edge > present.learning_rate / before * (
            1 + 1e-9
        ):  # nearer to the edge than a run that trains
            yield from _stability_not_measured(exact, edge / rate)
        return
    largest = edge / h if h > 0 else math.inf
    sentence = (
        f"The learning rate of {rate:.6g} is below the largest stable one, {largest:.4g}, at h = {h:.4g}."
    )
    if rate >= largest:
        sentence = (
            f"The learning rate of {rate:.6g} is not below the largest stable one, {_edge(exact, 'h')} ="
            f" {largest:.4g} at the measured curvature h = {h:.4g}: expect training to diverge."
        )
    yield Check("stability", rate < largest, rate, largest, sentence)
    factor = variance_inflation(rate, max(h, 0.0), exact.momentum, exact.dampening, nesterov=exact.nesterov)
    passed = factor <= LARGEST_VARIANCE
    sentence = (
        f"In the sharpest direction the weights vary {factor:.4g} times as much as the noise scale says"
        f" ({'at most' if passed else 'above'} {LARGEST_VARIANCE:g})."
    )
    if not passed:
        sentence += " The noise scale is no longer the whole story there."
    yield Check("variance", passed, factor, LARGEST_VARIANCE, sentence)


def _stability_not_measured(exact: Configuration, curvature: float) -> Iterator[Check]:
    yield Check(
        "stability",
        None,
        exact.learning_rate,
        None,
        f"A learning rate of {exact.learning_rate:.6g} is stable only where the largest curvature of the mean loss"
        f" stays below {_edge(exact, 'lr')} = {curvature:.4g}; it is not measured here (`Stability` does).",
    )
    # 1/(1 - r) = 1.1 at r = 1 - 1/1.1. Nesterov's momentum damps, and stays below it there.
    most = curvature * (1 - 1 / LARGEST_VARIANCE)
    yield Check(
        "variance",
        None,
        None,
        LARGEST_VARIANCE,
        f"The noise scale is the whole story only while that curvature stays below {most:.4g}.",
    )


def _edge(configuration: Configuration, below: str) -> str:
    """The formula of the edge, for the momentum at hand."""
    if configuration.nesterov:
        return f"2 (1 + m)/((1 + 2 m) {below})"
    if configuration.dampening > 0:
        return f"2 (1 + m)/((1 - d) {below})"
    return f"2 (1 + m)/{below}"


def _warm_up(present: Configuration, exact: Configuration) -> Check:
    ratio = exact.learning_rate / present.learning_rate
    if ratio <= 1 + 1e-9:
        return Check("warm_up", True, ratio, 1.0, "The learning rate does not grow: no warm-up.", action=True)
    return Check(
        "warm_up",
        False,
        ratio,
        1.0,
        f"The learning rate grows {ratio:.4g} times: warm it up from {present.learning_rate:.6g} over about 5"
        " epochs (Goyal et al. 2017).",
        action=True,
    )


def _epochs_and_steps(present: Configuration, exact: Configuration) -> Iterator[Check]:
    steps = exact.steps_per_epoch / present.steps_per_epoch
    time = exact.time_per_epoch / present.time_per_epoch
    if abs(time - 1) > NOTICEABLE:
        epochs = (
            f"An epoch covers {time:.3g} times the training time (learning rate x steps / (1 - m)) of a present"
            f" one: to train as long, divide the number of epochs by {time:.3g}."
        )
    elif abs(steps - 1) > NOTICEABLE:
        epochs = "To train as long, hold the number of epochs, not of steps."
    else:
        epochs = "To train as long, hold the number of epochs: it is also the same number of steps."
    passed = max(abs(time - 1), abs(steps - 1)) <= NOTICEABLE
    yield Check("epochs", passed, time, 1.0, epochs, action=True)
    counted = "A schedule or warm-up counted in steps stays as it is."
    if abs(steps - 1) > NOTICEABLE:
        counted = (
            f"An epoch takes {exact.steps_per_epoch:.4g} steps in place of {present.steps_per_epoch:.4g}: multiply"
            f" what is counted in steps (schedule, warm-up, max_steps) by {steps:.4g}."
        )
    yield Check("steps", abs(steps - 1) <= NOTICEABLE, steps, 1.0, counted, action=True)

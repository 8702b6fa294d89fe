"""What advice for SGD is held against: one function a check. Those that Adam shares are in `common_checks`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_bayes.functional.advice.common_checks import (
    LARGE_SHARE,
    NOTICEABLE,
    gradient_noise,
    small_batches,
    weight_decay,
    weight_ema,
    whole_batch,
)
from lightning_bayes.functional.check import Check, Measurements
from lightning_bayes.functional.configuration import Configuration, Unknown
from lightning_bayes.functional.stability import stability_edge, variance_inflation

# The stationary variance over the SDE's up to which, and down to one over which, g is still the whole story.
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
    yield from weight_decay(present, exact)


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
    # Of the mean loss, as h is; sentences speak of the learning rate that the user sets.
    h, rate, unit = measured.largest_eigenvalue, exact.mean_learning_rate, exact.summed_examples
    edge = stability_edge(exact.momentum, exact.dampening, nesterov=exact.nesterov)
    if h is None:
        before = stability_edge(present.momentum, present.dampening, nesterov=present.nesterov)
        if rate / edge > present.mean_learning_rate / before * (
            1 + 1e-9
        ):  # nearer to the edge than a run that trains
            yield from _stability_not_measured(exact, edge / rate)
        return
    largest = edge / h if h > 0 else math.inf
    sentence = (
        f"The learning rate of {rate / unit:.6g} is below the largest stable one, {largest / unit:.4g}, at"
        f" h = {h:.4g}."
    )
    if h <= 0:
        sentence = f"Every learning rate is stable: no direction has positive curvature (h = {h + 0.0:.4g})."
    elif rate >= largest:
        sentence = (
            f"The learning rate of {rate / unit:.6g} is not below the largest stable one, {_edge(exact, 'h')} ="
            f" {largest / unit:.4g} at the measured curvature h = {h:.4g}: expect training to diverge, unless a"
            " warm-up leads it to flatter weights."
        )
    yield Check("stability", rate < largest, rate / unit, largest / unit, sentence)
    factor = variance_inflation(rate, max(h, 0.0), exact.momentum, exact.dampening, nesterov=exact.nesterov)
    passed = 1 / LARGEST_VARIANCE <= factor <= LARGEST_VARIANCE
    limits = f"{'at most' if factor <= LARGEST_VARIANCE else 'above'} {LARGEST_VARIANCE:g}"
    if factor < 1 / LARGEST_VARIANCE:
        limits = f"below 1/{LARGEST_VARIANCE:g}: Nesterov's momentum damps"
    sentence = (
        f"In the sharpest direction the weights vary {factor:.4g} times as much as the noise scale says"
        f" ({limits})."
    )
    if math.isinf(factor):
        sentence = "In the sharpest direction the weights have no stationary variance: the steps grow there."
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
    most = _largest_curvature(exact)
    sentence = f"The noise scale is the whole story only while that curvature stays below {most:.4g}."
    if math.isinf(most):
        sentence = "The noise scale is the whole story at every curvature that is stable."
    yield Check("variance", None, None, LARGEST_VARIANCE, sentence)


def _largest_curvature(configuration: Configuration) -> float:
    """The curvature up to which `variance_inflation` is within its limits."""
    m, rate = configuration.momentum, configuration.mean_learning_rate
    edge = stability_edge(m, configuration.dampening, nesterov=configuration.nesterov)
    if not configuration.nesterov:  # 1/(1 - r) = 1.1
        return edge * (1 - 1 / LARGEST_VARIANCE) / rate

    def smallest(factor: float) -> float:
        # (1 - m)(1 + 2 m x/e) = f (1 - m + m x)(1 - x/e) is a x² + b x + c = 0 in x = ε h, e the edge.
        a = factor * m / edge
        b = 2 * m * (1 - m) / edge - factor * (m - (1 - m) / edge)
        c = (1 - m) * (1 - factor)
        root = b * b - 4 * a * c
        if root < 0:  # it never gets so small
            return math.inf
        # Without differences of nearly equal numbers: a vanishes with m.
        q = -(b + math.copysign(math.sqrt(root), b)) / 2
        roots = c / q, q / a if a > 0 else math.inf
        return min((x for x in roots if x > 0), default=math.inf)

    return min(smallest(LARGEST_VARIANCE), smallest(1 / LARGEST_VARIANCE)) / rate


def _edge(configuration: Configuration, below: str) -> str:
    """The formula of the edge, for the momentum at hand."""
    if configuration.reduction == "sum":  # the examples that are summed, over which h is a mean
        below = f"({below} * {configuration.summed_examples:.6g})"
    if configuration.nesterov:
        return f"2 (1 + m)/((1 + 2 m) {below})"
    if configuration.dampening > 0:
        return f"2 (1 + m)/((1 - d) {below})"
    return f"2 (1 + m)/{below}"


def _warm_up(present: Configuration, exact: Configuration) -> Check:
    ratio = exact.mean_learning_rate / present.mean_learning_rate
    on = " on the mean loss" if exact.reduction == "sum" else ""
    if ratio <= 1 + 1e-9:
        return Check("warm_up", True, ratio, 1.0, "The learning rate does not grow: no warm-up.", action=True)
    return Check(
        "warm_up",
        False,
        ratio,
        1.0,
        f"The learning rate{on} grows {ratio:.4g} times: warm it up from {exact.learning_rate / ratio:.6g} over"
        " about 5 epochs (Goyal et al. 2017).",
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
    in_all = steps / time  # of as many epochs as train as long
    if abs(in_all - 1) > NOTICEABLE:
        counted = (
            f"An epoch takes {exact.steps_per_epoch:.4g} steps in place of {present.steps_per_epoch:.4g}: to train as"
            f" long, multiply what is counted in steps (schedule, warm-up, max_steps) by {in_all:.4g}."
        )
    yield Check("steps", abs(in_all - 1) <= NOTICEABLE, in_all, 1.0, counted, action=True)

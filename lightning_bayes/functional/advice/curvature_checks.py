"""What the curvature says of advice for SGD: whether the learning rate is stable, and g the whole story."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_bayes.functional.advice.checks import Case
from lightning_bayes.functional.check import Check
from lightning_bayes.functional.configuration import Configuration
from lightning_bayes.functional.stability import stability_edge, variance_inflation

# The stationary variance over the SDE's up to which, and down to one over which, g is still the whole story.
LARGEST_VARIANCE = 1.1


def stability(case: Case[Configuration]) -> Iterator[Check]:
    """The learning rate against the largest stable one, and the variance in the sharpest direction."""
    h, advised = case.measured.largest_eigenvalue, case.advised
    # Of the mean loss, as h is; sentences speak of the learning rate that the user sets.
    rate, unit = advised.mean_learning_rate, advised.summed_examples
    edge = stability_edge(advised.momentum, advised.dampening, nesterov=advised.nesterov)
    if h is None:
        yield from _not_measured(case.present, advised, edge)
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
            f"The learning rate of {rate / unit:.6g} is not below the largest stable one, {_edge(advised, 'h')} ="
            f" {largest / unit:.4g} at the measured curvature h = {h:.4g}: expect training to diverge, unless a"
            " warm-up leads it to flatter weights."
        )
    yield Check("stability", rate < largest, rate / unit, largest / unit, sentence)
    yield _variance(advised, rate, h)


def _variance(advised: Configuration, rate: float, h: float) -> Check:
    factor = variance_inflation(
        rate, max(h, 0.0), advised.momentum, advised.dampening, nesterov=advised.nesterov
    )
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
    return Check("variance", passed, factor, LARGEST_VARIANCE, sentence)


def _not_measured(present: Configuration, advised: Configuration, edge: float) -> Iterator[Check]:
    """Up to which curvature the two pass; nothing where the run, which trains, was nearer to the edge."""
    rate = advised.mean_learning_rate
    before = stability_edge(present.momentum, present.dampening, nesterov=present.nesterov)
    if rate / edge <= present.mean_learning_rate / before * (1 + 1e-9):
        return
    sentence = (
        f"A learning rate of {advised.learning_rate:.6g} is stable only where the largest curvature of the mean loss"
        f" stays below {_edge(advised, 'lr')} = {edge / rate:.4g}; it is not measured here (`Stability` does)."
    )
    yield Check("stability", None, advised.learning_rate, None, sentence)
    most = _largest_curvature(advised, edge)
    sentence = f"The noise scale is the whole story only while that curvature stays below {most:.4g}."
    if math.isinf(most):
        sentence = "The noise scale is the whole story at every curvature that is stable."
    yield Check("variance", None, None, LARGEST_VARIANCE, sentence)


def _largest_curvature(configuration: Configuration, edge: float) -> float:
    """The curvature up to which `variance_inflation` is within its limits."""
    m, rate = configuration.momentum, configuration.mean_learning_rate
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

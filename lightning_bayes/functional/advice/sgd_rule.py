"""What keeps the noise of SGD, g = ε (N/B - 1) (1 - τ) / (1 - m), why, and what the curvature says of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from lightning_bayes.functional.advice.advice import Move
from lightning_bayes.functional.advice.checks import (
    Case,
    epochs_and_steps,
    gradient_noise,
    rules_agree,
    small_batches,
    warm_up,
    weight_decay,
    weight_ema,
    whole_batch,
)
from lightning_bayes.functional.advice.rule import Rule
from lightning_bayes.functional.check import Check
from lightning_bayes.functional.configuration import Configuration, Targets, Unknown
from lightning_bayes.functional.scaling import solve
from lightning_bayes.functional.stability import stability_edge, variance_inflation

# The stationary variance over the SDE's up to which, and down to one over which, g is still the whole story.
LARGEST_VARIANCE = 1.1


def _noise_scale_equation(present: Configuration) -> str:
    """The equation of g with the present numbers, such as `g = lr (N/B - 1)/(1 - m) = 0.1 * ... = 30.25`."""
    left, right = ("", "") if present.dampening == 0 else (" (1 - d)", f" * (1 - {present.dampening:.6g})")
    b, times = ("", "") if present.reduction == "mean" else (" b", f" * {present.summed_examples:.6g}")
    return (
        f"g = lr{b} (N/B - 1){left}/(1 - m) = {present.learning_rate:.6g}{times} *"
        f" ({present.dataset_size}/{present.batch_size:.6g} - 1){right}/(1 - {present.momentum:.6g})"
        f" = {present.noise_scale:.6g}"
    )


def _why(present: Configuration, targets: Targets, move: Move[Configuration]) -> Iterator[str]:
    if move.advised is not None:
        yield _exact_equation(present.noise_scale, move.advised, move.solved_for)
    if move.linear is not None:
        yield _linear_equation(present, move.linear, move.solved_for)


def _exact_equation(scale: float, exact: Configuration, unknown: Unknown) -> str:
    """The exact inverse that gave `exact`, with the noise scale and the new numbers put in."""
    left, right = ("", "") if exact.dampening == 0 else ("/(1 - d')", f"/(1 - {exact.dampening:.6g})")
    momentum, examples = f"(1 - {exact.momentum:.6g})", exact.dataset_size
    learning_rate, batch_size = f"{exact.learning_rate:.6g}", f"{exact.batch_size:.6g}"
    if unknown == "learning_rate":
        # The examples that a summed loss sums.
        b, times = ("", "") if exact.reduction == "mean" else ("/b'", f"/{exact.summed_examples:.6g}")
        numbers = f"{scale:.6g} * {momentum}/({examples}/{batch_size} - 1){right}{times}"
        return f"exact: lr' = g (1 - m')/(N'/B' - 1){left}{b} = {numbers} = {learning_rate}"
    if exact.reduction == "sum":
        numbers = f"{examples} - {scale:.6g} * {exact.averaged_batches} * {momentum}/{learning_rate}{right}"
        return f"exact: B' = N' - g k (1 - m')/lr'{left} = {numbers} = {batch_size}"
    numbers = f"{examples}/(1 + {scale:.6g} * {momentum}/{learning_rate}{right})"
    return f"exact: B' = N'/(1 + g (1 - m')/lr'{left}) = {numbers} = {batch_size}"


def _linear_equation(present: Configuration, linear: Configuration, unknown: Unknown) -> str:
    """The linear rule that gave `linear`, as ratios of which those that are 1 are left out."""
    # ε' = ε (B'/B) (N/N') (1 - m')/(1 - m) (1 - τ)/(1 - τ'), and with the same ratios upside down
    # B' = B (ε'/ε) (N'/N) (1 - m)/(1 - m') (1 - τ')/(1 - τ).
    ratios = [
        (("N", present.dataset_size), ("N'", linear.dataset_size)),
        (("(1 - m')", 1 - linear.momentum), ("(1 - m)", 1 - present.momentum)),
        (("(1 - d)", 1 - present.dampening), ("(1 - d')", 1 - linear.dampening)),
    ]
    symbol, start, result = "lr", present.learning_rate, linear.learning_rate
    if unknown == "batch_size":
        symbol, start, result = "B", present.batch_size, linear.batch_size
        ratios = [(("lr", present.learning_rate), ("lr'", linear.learning_rate)), *ratios]
        ratios = [(above, below) for below, above in ratios]
    elif present.reduction == "mean":  # a sum over the batch takes the ratio of the batches into itself
        ratios = [(("B'", linear.batch_size), ("B", present.batch_size)), *ratios]
    changed = [(above, below) for above, below in ratios if above[1] != below[1]]
    letters = "".join(f" * {above[0]}/{below[0]}" for above, below in changed)
    numbers = "".join(f" * {above[1]:.6g}/{below[1]:.6g}" for above, below in changed)
    shown = f"{start:.6g}{numbers} = " if numbers else ""
    return f"linear: {symbol}' = {symbol}{letters} = {shown}{result:.6g}"


def _notes(
    present: Configuration,
    targets: Targets,
    unchanged: Configuration | None,
    moves: tuple[Move[Configuration], ...],
) -> Iterator[str]:
    if present.reduction == "sum":
        k = present.averaged_batches
        over = "the batch" if k == 1 else f"B/{k} examples, since {k} batches are averaged in a step"
        yield (
            f"The loss is a sum over the examples of a training_step ({over}), and the learning rates are those"
            " of that sum for the batch size beside them; g is of the mean loss, on which they are so many times as"
            " large."
        )
    if targets.momentum == 0 and present.dampening > 0:
        yield "Dampening acts through the momentum buffer: without momentum it is 0."
    solutions = [(move.solved_for, move.advised) for move in moves if move.advised is not None]
    if len(moves) < 2:
        return
    if targets.batch_size is None and targets.learning_rate is None:
        if len(solutions) == len(moves):
            yield "The learning rate and the batch size are alternatives: change one of them, not both."
        return
    if unchanged is not None:
        before, after = present.noise_scale, unchanged.noise_scale
        times = f", {after / before:.3g} times the present one" if before > 0 and after > 0 else ""
        yield f"With both targets the noise scale goes from {before:.6g} to {after:.6g}{times}."
    for solved_for, exact in solutions:
        rate, batch = f"learning rate of {exact.learning_rate:g}", f"batch size of {exact.batch_size:g}"
        if solved_for == "learning_rate":
            yield f"To restore it at a {batch}: learning rate {exact.learning_rate:.6g}."
        else:
            yield f"To restore it at a {rate}: batch size {exact.batch_size:.6g}."


def _stability(case: Case[Configuration]) -> Iterator[Check]:
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


SGD = Rule(
    Targets.unknowns,
    "exact",
    partial(solve, rule="exact"),
    partial(solve, rule="linear"),
    _noise_scale_equation,
    _why,
    _notes,
    checks=(
        rules_agree,
        small_batches,
        gradient_noise,
        _stability,
        warm_up,
        whole_batch,
        epochs_and_steps,
        weight_ema,
        weight_decay,
    ),
)

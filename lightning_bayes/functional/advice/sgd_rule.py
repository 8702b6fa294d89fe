"""What keeps the noise of SGD, g = ε (N/B - 1) (1 - τ) / (1 - m), and the equations with their numbers in ASCII."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lightning_bayes.functional.advice.advice import Move
from lightning_bayes.functional.advice.checks import (
    epochs_and_steps,
    gradient_noise,
    rules_agree,
    small_batches,
    warm_up,
    weight_decay,
    weight_ema,
    whole_batch,
)
from lightning_bayes.functional.advice.curvature_checks import stability
from lightning_bayes.functional.advice.rule import Rule
from lightning_bayes.functional.configuration import Configuration, Targets, Unknown
from lightning_bayes.functional.scaling import solve


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
        stability,
        warm_up,
        whole_batch,
        epochs_and_steps,
        weight_ema,
        weight_decay,
    ),
)

"""When to doubt rescaling advice: one function a caveat, each yielding sentences where it applies.

`large_batch` and `rounding` serve the advice for Adam too; the rest is SGD's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning_bayes.functional.adam_scaling import AdamConfiguration
from lightning_bayes.functional.configuration import Configuration, Targets
from lightning_bayes.functional.scaling import Move

# Below this relative difference two advised values are the same in practice, and nothing is said of it.
NOTICEABLE = 0.01
# The share of the training set above which a batch is no longer "B << N".
LARGE_SHARE = 0.1


def caveats_of(
    present: Configuration, targets: Targets, unchanged: Configuration | None, moves: tuple[Move, ...]
) -> Iterator[str]:
    """Everything that limits the advice, the most important first.

    Args:
        present: the configuration whose noise scale is kept.
        targets: what changes.
        unchanged: the targets put in and nothing else changed; None if that cannot be.
        moves: the solutions.

    Yields:
        One sentence or two for each caveat that applies.
    """
    yield from _alternatives(present, targets, unchanged, moves)
    exact = [move.exact for move in moves if move.exact is not None]
    for move in moves:
        yield from _rules_differ(move)
    law = "a constant noise scale is a law of B << N, and even the exact formula is an extrapolation there"
    yield from large_batch(present, exact, law)
    for solution in exact:
        yield from rounding(solution, "the noise scale")
    yield from _larger_learning_rate(present, exact)
    yield from _epochs_and_steps(present, moves)
    yield from _weight_decay(present, targets)
    if targets.momentum == 0 and present.dampening > 0:
        yield "Dampening acts through the momentum buffer: without momentum it is 0."


def _alternatives(
    present: Configuration, targets: Targets, unchanged: Configuration | None, moves: tuple[Move, ...]
) -> Iterator[str]:
    if len(moves) < 2:
        return
    if targets.batch_size is None and targets.learning_rate is None:
        if any(move.exact is None for move in moves):
            return
        yield "The learning rate and the batch size are alternatives: change one of them, not both."
        return
    goal = targets.fixed(present)
    if unchanged is not None:
        before, after = present.noise_scale, unchanged.noise_scale
        times = f", {after / before:.3g} times the present one" if before > 0 else ""
        yield f"With both targets the noise scale goes from {before:.6g} to {after:.6g}{times}."
    for move in moves:
        if move.exact is None:
            continue
        if move.solved_for == "learning_rate":
            learning_rate = f"{move.exact.learning_rate:.6g}"
            yield f"To restore it at a batch size of {goal.batch_size:g}: learning rate {learning_rate}."
        else:
            batch_size = f"{move.exact.batch_size:.6g}"
            yield f"To restore it at a learning rate of {goal.learning_rate:g}: batch size {batch_size}."


def _rules_differ(move: Move) -> Iterator[str]:
    if move.exact is None or move.linear is None:
        return
    exact, linear = move.exact.learning_rate, move.linear.learning_rate
    if move.solved_for == "batch_size":
        exact, linear = move.exact.batch_size, move.linear.batch_size
    difference = linear / exact - 1
    if abs(difference) > NOTICEABLE:
        name = move.solved_for.replace("_", " ")
        yield (
            f"The linear rule's {name} is {abs(difference):.0%}"
            f" {'above' if difference > 0 else 'below'} the exact one: the -1 in N/B - 1, which it"
            " drops, matters at these batch sizes."
        )


def large_batch(
    present: Configuration | AdamConfiguration,
    solutions: Sequence[Configuration | AdamConfiguration],
    law: str,
) -> Iterator[str]:
    """Batches that are no longer small beside the training set, or larger than they pay for.

    Args:
        present: the configuration whose noise is kept.
        solutions: the advised ones.
        law: why the rule does not reach so far, as the second half of a sentence.

    Yields:
        The caveats.
    """
    for case, configuration in [("present", present), *(("advised", solution) for solution in solutions)]:
        batch_size, dataset_size = configuration.batch_size, configuration.dataset_size
        if dataset_size is None or batch_size <= LARGE_SHARE * dataset_size:
            continue
        yield f"The {case} batch of {batch_size:.6g} is above N/10 = {dataset_size / 10:g}: {law}."
        if batch_size == dataset_size:
            yield (
                f"The {case} batch is the whole training set: its gradient has no sampling noise, at any"
                " learning rate."
            )
    if any(solution.batch_size > present.batch_size for solution in solutions):
        yield (
            "A larger batch saves steps only while it is below the noise scale of the gradient itself"
            " (McCandlish et al. 2018), which is not measured here."
        )


def rounding(solution: Configuration | AdamConfiguration, quantity: str) -> Iterator[str]:
    """What a solved batch size that is no whole number costs.

    Args:
        solution: the advised configuration.
        quantity: what its `noise_scale` is called in the sentence.

    Yields:
        The caveat, if the batch is not whole.
    """
    whole = max(1, math.floor(solution.batch_size + 0.5))
    if abs(whole - solution.batch_size) > 1e-9 * whole:
        rounded = replace(solution, batch_size=whole)
        yield (
            f"A batch of {solution.batch_size:.6g} has to be a whole number: with {whole} {quantity} is"
            f" {rounded.noise_scale:.6g} in place of {solution.noise_scale:.6g}."
        )


def _larger_learning_rate(present: Configuration, exact: list[Configuration]) -> Iterator[str]:
    larger = [solution for solution in exact if solution.learning_rate > present.learning_rate * (1 + 1e-9)]
    if not larger:
        return
    solution = max(larger, key=lambda configuration: configuration.learning_rate)
    yield (
        f"The learning rate grows {solution.learning_rate / present.learning_rate:.4g} times: warm it up from"
        f" {present.learning_rate:.6g} over about 5 epochs (Goyal et al. 2017)."
    )
    bound = 2 * (1 + solution.momentum) / solution.learning_rate
    yield (
        f"Training at learning rate {solution.learning_rate:.6g} is stable only where the curvature of"
        f" the mean loss stays below 2 (1 + m)/lr = {bound:.4g}; the curvature is not measured here."
    )


def _epochs_and_steps(present: Configuration, moves: tuple[Move, ...]) -> Iterator[str]:
    for move in moves:
        solution = move.exact
        if solution is None:
            continue
        steps = solution.steps_per_epoch / present.steps_per_epoch
        time = solution.time_per_epoch / present.time_per_epoch
        which = f" with the new {move.solved_for.replace('_', ' ')}" if len(moves) > 1 else ""
        if abs(time - 1) > NOTICEABLE:
            yield (
                f"An epoch{which} covers {time:.3g} times the training time (learning rate x steps / (1"
                f" - m)) of a present one: to train as long, divide the number of epochs by {time:.3g}."
            )
        elif abs(steps - 1) > NOTICEABLE:
            yield f"To train as long{which}, hold the number of epochs, not of steps."
        if abs(steps - 1) > NOTICEABLE:
            yield (
                f"An epoch{which} takes {solution.steps_per_epoch:.4g} steps in place of"
                f" {present.steps_per_epoch:.4g}: a schedule or warm-up counted in steps shrinks or"
                " grows with it."
            )


def _weight_decay(present: Configuration, targets: Targets) -> Iterator[str]:
    if targets.dataset_size is not None and targets.dataset_size != present.dataset_size:
        yield (
            "An L2 penalty is a prior of precision N * weight_decay: to keep it, multiply weight_decay"
            f" by N/N' = {present.dataset_size}/{targets.dataset_size} ="
            f" {present.dataset_size / targets.dataset_size:.6g}."
        )

"""What a move is held against: one function a check. What no two rules share is beside its rule.

A check that passes says so too: a table shows those that do not, the data hold them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic

from lightning_bayes.functional.check import Check, Measurements
from lightning_bayes.functional.configuration import Configuration, ConfigurationType, Unknown

# Below this relative difference two values are the same in practice, and nothing is to be done.
NOTICEABLE = 0.01
# The share of the training set above which a batch is no longer "B << N"; there the rules differ by as much.
LARGE_SHARE = 0.1
# Why no rule reaches so far, by optimizer.
LAWS = {
    "sgd": "a constant noise scale is a law of B << N, and even the exact formula is an extrapolation there",
    "adam": "the square-root rule takes the gradient's variance to fall as 1/B, which is so for B << N only (it falls"
    " as 1/B - 1/N), and is an extrapolation there",
}
KEPT = {"sgd": "the noise scale", "adam": "lr/sqrt(B)"}


@dataclass(frozen=True)
class Case(Generic[ConfigurationType]):
    """One move, and what it is held against.

    Attributes:
        present: the configuration whose noise is kept.
        advised: the one by the optimizer's own rule.
        linear: the one by the linear rule; None where that leaves the training set.
        unknown: what was solved for.
        measured: curvature and gradient noise, where they were measured.
    """

    present: ConfigurationType
    advised: ConfigurationType
    linear: ConfigurationType | None
    unknown: Unknown
    measured: Measurements


def rules_agree(case: Case[Configuration]) -> Iterator[Check]:
    """The linear rule beside the exact inverse."""
    if case.linear is None:
        return
    value, other = getattr(case.advised, case.unknown), getattr(case.linear, case.unknown)
    difference = other / value - 1
    name = case.unknown.replace("_", " ")
    sentence = f"The exact and the linear rule agree on the {name} within {max(abs(difference), 1e-4):.2%}."
    if abs(difference) > NOTICEABLE:
        sentence = (
            f"The rules differ: the linear rule's {name} is {abs(difference):.0%}"
            f" {'above' if difference > 0 else 'below'} the exact one, because of the -1 in N/B - 1, which it"
            f" drops. The range is {min(value, other):.4g} to {max(value, other):.4g}."
        )
    yield Check("rules_agree", abs(difference) <= LARGE_SHARE, difference, LARGE_SHARE, sentence)


def small_batches(case: Case[ConfigurationType]) -> Iterator[Check]:
    """B and B' against N/10, above which no rule is derived; where the size of the training set is known."""
    for name, which, configuration in [
        ("present_batch_size", "present", case.present),
        ("batch_size", "advised", case.advised),
    ]:
        batch_size, dataset_size = configuration.batch_size, configuration.dataset_size
        if dataset_size is None:
            continue
        most = LARGE_SHARE * dataset_size
        sentence = f"The {which} batch of {batch_size:.6g} is within N/10 = {most:.6g}."
        if batch_size > most:
            law = LAWS[configuration.optimizer]
            sentence = f"The {which} batch of {batch_size:.6g} is above N/10 = {most:.6g}: {law}."
        if batch_size == dataset_size:
            sentence += (
                f" The {which} batch is the whole training set: its gradient has no sampling noise, at any"
                " learning rate."
            )
        yield Check(name, batch_size <= most, batch_size, most, sentence)


def gradient_noise(case: Case[ConfigurationType]) -> Iterator[Check]:
    """B' against B_simple, beyond which a larger batch saves few steps; only where the batch grows."""
    batch_size, limit = case.advised.batch_size, case.measured.gradient_noise_scale
    if batch_size <= case.present.batch_size:
        return
    if limit is None or math.isnan(limit):
        why = "is not measured here (`GradientNoiseScale` does)"
        if limit is not None:
            why = "was measured and not resolved: its mean gradient is lost in the noise"
        sentence = (
            "A larger batch saves steps only while it is below the noise scale of the gradient itself, B_simple"
            f" (McCandlish et al. 2018), which {why}."
        )
        yield Check("gradient_noise_scale", None, batch_size, None, sentence)
        return
    sentence = f"The batch of {batch_size:.6g} is within the gradient noise scale B_simple = {limit:.4g}."
    if batch_size > limit:
        # McCandlish et al., eq. 2.7: steps S = S_min (1 + B_simple/B), examples E = E_min (1 + B/B_simple).
        examples = (1 + batch_size / limit) / (1 + case.present.batch_size / limit)
        sentence = (
            f"The batch of {batch_size:.6g} is above the gradient noise scale B_simple = {limit:.4g}: it"
            f" saves few steps, and takes about {examples:.3g} times the examples of the present batch to the"
            " same loss (McCandlish et al. 2018)."
        )
    yield Check("gradient_noise_scale", batch_size <= limit, batch_size, limit, sentence)


def warm_up(case: Case[ConfigurationType]) -> Iterator[Check]:
    """How much the learning rate grows; of SGD that on the mean loss, whose steps it makes."""
    on, digits, ratio = "", 3, case.advised.learning_rate / case.present.learning_rate
    how = "keep or lengthen the warm-up"
    if isinstance(case.advised, Configuration) and isinstance(case.present, Configuration):
        digits, ratio = 4, case.advised.mean_learning_rate / case.present.mean_learning_rate
        on = " on the mean loss" if case.advised.reduction == "sum" else ""
        start = case.advised.learning_rate / ratio
        how = f"warm it up from {start:.6g} over about 5 epochs (Goyal et al. 2017)"
    sentence = "The learning rate does not grow: no warm-up."
    grows = ratio > 1 + 1e-9
    if grows:
        sentence = f"The learning rate{on} grows {ratio:.{digits}g} times: {how}."
    yield Check("warm_up", not grows, ratio, 1.0, sentence, action=True)


def whole_batch(case: Case[ConfigurationType]) -> Iterator[Check]:
    """What a solved batch size that is no whole number costs."""
    batch_size = case.advised.batch_size
    whole = max(1, math.floor(batch_size + 0.5))
    if abs(whole - batch_size) > 1e-9 * whole:
        sentence = (
            f"A batch of {batch_size:.6g} has to be a whole number: with {whole} {KEPT[case.advised.optimizer]} is"
            f" {replace(case.advised, batch_size=whole).noise_scale:.6g} in place of {case.advised.noise_scale:.6g}."
        )
        yield Check("whole_batch", False, batch_size, whole, sentence, action=True)


def epochs_and_steps(case: Case[Configuration]) -> Iterator[Check]:
    """How long to train, in epochs and in steps, for as much training time as now."""
    present, advised = case.present, case.advised
    steps = advised.steps_per_epoch / present.steps_per_epoch
    time = advised.time_per_epoch / present.time_per_epoch
    epochs = "To train as long, hold the number of epochs: it is also the same number of steps."
    if abs(time - 1) > NOTICEABLE:
        epochs = (
            f"An epoch covers {time:.3g} times the training time (learning rate x steps / (1 - m)) of a present"
            f" one: to train as long, divide the number of epochs by {time:.3g}."
        )
    elif abs(steps - 1) > NOTICEABLE:
        epochs = "To train as long, hold the number of epochs, not of steps."
    passed = max(abs(time - 1), abs(steps - 1)) <= NOTICEABLE
    yield Check("epochs", passed, time, 1.0, epochs, action=True)
    counted = "A schedule or warm-up counted in steps stays as it is."
    in_all = steps / time  # of as many epochs as train as long
    if abs(in_all - 1) > NOTICEABLE:
        counted = (
            f"An epoch takes {advised.steps_per_epoch:.4g} steps in place of {present.steps_per_epoch:.4g}: to train"
            f" as long, multiply what is counted in steps (schedule, warm-up, max_steps) by {in_all:.4g}."
        )
    yield Check("steps", abs(in_all - 1) <= NOTICEABLE, in_all, 1.0, counted, action=True)


def weight_ema(case: Case[ConfigurationType]) -> Iterator[Check]:
    """An average of the weights, ρ -> ρ^κ, so that it spans the same part of an epoch."""
    # κ is the ratio of steps per epoch. With the data as they are that is B'/B (Busbridge et al. 2023); with
    # more data both rules keep the training time of a step times N, and so the same ratio.
    kappa = case.advised.batch_size / case.present.batch_size
    if case.present.dataset_size is not None and case.advised.dataset_size is not None:
        kappa *= case.present.dataset_size / case.advised.dataset_size
    rho = case.measured.ema_decay
    if abs(kappa - 1) <= 1e-9:
        yield Check("weight_ema", True, rho, rho, "An average of the weights keeps its decay.", action=True)
        return
    value, limit = kappa, None
    sentence = f"An average of the weights with decay rho becomes rho^{kappa:.4g}."
    if rho is not None:
        value, limit = rho, rho**kappa
        sentence = f"The average of the weights: decay {rho:g} becomes {rho:g}^{kappa:.4g} = {limit:.6g}."
    yield Check("weight_ema", False, value, limit, sentence, action=True)


def weight_decay(case: Case[ConfigurationType]) -> Iterator[Check]:
    """The prior that an L2 penalty is, λ = N · weight_decay / b, where N changes or the b examples of a sum."""
    before, after = case.present.dataset_size, case.advised.dataset_size
    data = 1.0 if before is None or after is None else before / after
    old, new = case.present.summed_examples, case.advised.summed_examples
    if data == 1 and new == old:
        return
    # A loss summed over b examples is b times the mean, beside the same penalty.
    factor = data * (new / old)
    shown, precision = f"N/N' = {before}/{after}", "N * weight_decay"
    if new != old:
        shown = f"b'/b = {new:.6g}/{old:.6g}"
        if data != 1:
            shown = f"N b'/(N' b) = {before} * {new:.6g}/({after} * {old:.6g})"
        precision = "N * weight_decay / b beside a loss that sums b examples"
    sentence = (
        f"An L2 penalty is a prior of precision {precision}: to keep it, multiply weight_decay"
        f" by {shown} = {factor:.6g}."
    )
    yield Check("weight_decay", False, factor, 1.0, sentence, action=True)

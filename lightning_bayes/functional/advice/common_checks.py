"""What advice for SGD and for Adam is held against alike: one function a check.

A check that passes says so too: a table shows those that do not, the data hold them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from lightning_bayes.functional.adam_scaling import AdamConfiguration
from lightning_bayes.functional.check import Check, Measurements
from lightning_bayes.functional.configuration import Configuration

AnyConfiguration = TypeVar("AnyConfiguration", Configuration, AdamConfiguration)

# Below this relative difference two values are the same in practice, and nothing is to be done.
NOTICEABLE = 0.01
# The share of the training set above which a batch is no longer "B << N"; there the rules differ by as much.
LARGE_SHARE = 0.1


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


def weight_decay(present: AnyConfiguration, solution: AnyConfiguration) -> Iterator[Check]:
    """The prior that an L2 penalty is, λ = N · weight_decay / b, where N changes or the b examples of a sum."""
    if present.dataset_size is None or solution.dataset_size is None:
        data = 1.0
    else:
        data = present.dataset_size / solution.dataset_size
    # A loss summed over b examples is b times the mean, beside the same penalty.
    factor = data * (solution.summed_examples / present.summed_examples)
    if data == 1 and solution.summed_examples == present.summed_examples:
        return
    before, after = present.dataset_size, solution.dataset_size
    shown, precision = f"N/N' = {before}/{after}", "N * weight_decay"
    if solution.summed_examples != present.summed_examples:
        b, other = f"{solution.summed_examples:.6g}", f"{present.summed_examples:.6g}"
        shown = f"b'/b = {b}/{other}" if data == 1 else f"N b'/(N' b) = {before} * {b}/({after} * {other})"
        precision = "N * weight_decay / b beside a loss that sums b examples"
    yield Check(
        "weight_decay",
        False,
        factor,
        1.0,
        f"An L2 penalty is a prior of precision {precision}: to keep it, multiply weight_decay"
        f" by {shown} = {factor:.6g}.",
        action=True,
    )

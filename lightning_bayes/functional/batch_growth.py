"""Growing the batch in place of decaying the learning rate: how far, how it is made up, what is left for ε."""

import math
from dataclasses import dataclass
from typing import Literal

from lightning_bayes.functional._validation import (
    ROUNDING,
    batch_within_dataset,
    count,
    finite,
    optional_count,
)
from lightning_bayes.functional.scaling import Rule

GrowthMethod = Literal["accumulate", "reload"]
METHODS = ("accumulate", "reload")
RULES = ("linear", "exact", "sqrt")


@dataclass(frozen=True)
class BatchGrowth:
    """A batch that has grown in place of a decay of the learning rate.

    Attributes:
        decay: κ, what the learning rate would have been divided by; at least 1, infinite where it would be 0.
        batch_size: B', examples per optimizer step: device_batch_size x accumulation x replicas.
        device_batch_size: examples of one batch of the loader, on each replica.
        accumulation: batches per optimizer step.
        learning_rate_gain: s, the factor by which the **decayed** learning rate is multiplied at B', so that
            the noise is that of the decayed run at B. Where the batch took the whole decay it is κ.
        limited: whether `max_batch_size` kept the batch from taking more of the decay.
    """

    decay: float
    batch_size: int
    device_batch_size: int
    accumulation: int
    learning_rate_gain: float
    limited: bool

    @property
    def learning_rate_factor(self) -> float:
        """s/κ, the factor on the learning rate **before** the decay: 1 where the batch took all of it."""
        return self.learning_rate_gain / self.decay


def grow_batch(
    decay: float,
    *,
    device_batch_size: int,
    accumulation: int = 1,
    replicas: int = 1,
    dataset_size: int,
    batch_size: int | None = None,
    max_batch_size: int | None = None,
    max_device_batch_size: int | None = None,
    method: GrowthMethod = "accumulate",
    rule: Rule = "linear",
) -> BatchGrowth:
    """The batch to train on where the learning rate would have been divided by κ.

    linear, exact:  B' <= κ B         (Smith et al. 2018)
    sqrt:           B' <= κ² B        (Adam's rule: ε/√B stays)

    B' is the largest batch that can be made up, at most κB (κ²B), at most `max_batch_size`, and at least B. The
    decayed learning rate ε/κ is then multiplied by the s of `learning_rate_gain`, so that nothing of the decay is
    lost to rounding or to the limit. As B' is never rounded up, εs/κ does not exceed ε under "linear" and "sqrt",
    nor ε/(1 - B'/N) under "exact".

    Args:
        decay: κ >= 1, may be infinite.
        device_batch_size: examples of one batch of the loader on each replica; whole.
        accumulation: batches per optimizer step before the batch grows; whole.
        replicas: data-parallel processes that draw different examples; whole.
        dataset_size: N, training examples; whole.
        batch_size: B, the examples per optimizer step that κ refers to; by default the product of the three.
        max_batch_size: limit on B' in examples; N/10 by default, since the exchange of κ for B holds while B ≪ N.
            A B beyond it stays as it is.
        max_device_batch_size: limit on a batch of the loader in examples, for memory; at least
            `device_batch_size`.
        method: "accumulate" makes up B' from more batches of the same size, "reload" from larger ones, and
            accumulates beyond `max_device_batch_size`.
        rule: "linear", "exact" or "sqrt", see `learning_rate_gain`.

    Returns:
        B', what it is made up of, and s.

    Raises:
        ValueError: naming the argument that is outside its domain.

    Reference:
        Smith, Kindermans, Ying & Le, Don't Decay the Learning Rate, Increase the Batch Size, ICLR 2018,
        arXiv:1711.00489.
    """
    requirement = "a number of at least 1, the factor by which the learning rate would be divided"
    kappa = math.inf if decay == math.inf else finite("decay", decay, requirement)
    if kappa < 1:
        raise ValueError(f"Expected argument `decay` to be {requirement}, but got {decay!r}.")
    start = count("device_batch_size", device_batch_size), count("accumulation", accumulation)
    examples, copies = count("dataset_size", dataset_size), count("replicas", replicas)
    present = start[0] * start[1] * copies if batch_size is None else count("batch_size", batch_size)
    limit = max(1, examples // 10) if max_batch_size is None else count("max_batch_size", max_batch_size)
    batch_within_dataset("max_batch_size", limit, "dataset_size", examples)
    memory = optional_count("max_device_batch_size", max_device_batch_size)
    if memory is not None and memory < start[0]:
        raise ValueError(
            "Expected argument `max_device_batch_size` to be at least the batch of the loader to start with"
            f" ({start[0]} examples), but got {memory}."
        )
    if method not in METHODS:
        raise ValueError(f'Expected argument `method` to be "accumulate" or "reload", but got {method!r}.')
    wanted = present * (kappa**2 if rule == "sqrt" else kappa)
    target = max(present, min(wanted, limit))
    if present == math.prod(start) * copies and target == present:
        device, steps = start  # not a grown batch: what the user has chosen, whatever the method
    elif method == "accumulate":
        device, steps = start[0], max(1, _whole(target / (start[0] * copies)))
    else:
        whole = max(1, _whole(target / copies))
        steps = start[1] if memory is None else math.ceil(whole / memory)
        device = max(1, whole // steps)
    grown = device * steps * copies
    gain = learning_rate_gain(present, grown, examples, rule)
    return BatchGrowth(
        kappa, grown, device, steps, gain, limited=wanted > max(limit, present) * (1 + ROUNDING)
    )


def learning_rate_gain(
    batch_size: int, new_batch_size: int, dataset_size: int, rule: Rule = "linear"
) -> float:
    """The factor on the learning rate that keeps the noise when the batch goes from B to B'.

    linear:  s = B'/B                        keeps ε/B, which is g for B' ≪ N
    exact:   s = (N/B - 1)/(N/B' - 1)        keeps g = ε (N/B - 1)(1 - τ)/(1 - m)
    sqrt:    s = √(B'/B)                     keeps ε/√B, for Adam

    Args:
        batch_size: B, examples per optimizer step; whole.
        new_batch_size: B'; whole. Below N under "exact", unless it is B.
        dataset_size: N, training examples; whole. Only "exact" depends on it.
        rule: "linear", "exact" or "sqrt".

    Returns:
        s > 0, and exactly 1 at B' = B.

    Raises:
        ValueError: naming the argument that is outside its domain; under "exact" also for a B or B' of N, where
            g is 0 whatever the learning rate.

    Reference:
        Smith & Le, ICLR 2018, arXiv:1710.06451, section 5; Smith et al., ICLR 2018, arXiv:1711.00489; for "sqrt"
        Malladi et al., NeurIPS 2022, arXiv:2205.10287.
    """
    present, grown = count("batch_size", batch_size), count("new_batch_size", new_batch_size)
    examples = count("dataset_size", dataset_size)
    check_rule(rule)
    if grown == present:
        return 1.0
    if rule == "linear":
        return grown / present
    if rule == "sqrt":
        return math.sqrt(grown / present)
    if max(present, grown) >= examples:
        raise ValueError(
            f'Expected `batch_size` and `new_batch_size` to be below `dataset_size` ({examples}) with rule="exact",'
            f" but got {present} and {grown}: at full batch the noise scale is 0 at every learning rate."
        )
    return ((examples - present) * grown) / ((examples - grown) * present)


def check_rule(rule: object) -> None:
    """Raise a ValueError for a rule that does not exist."""
    if rule not in RULES:
        raise ValueError(f'Expected argument `rule` to be "linear", "exact" or "sqrt", but got {rule!r}.')


def schedule_steps(batches: int, epoch_batches: float, accumulation: int, frequency: int = 1) -> int:
    """How often Lightning has stepped a learning-rate schedule counted in steps, within one epoch.

    After every `frequency`-th batch of those with an optimizer step: the multiples of `accumulation`, and the
    last batch of the epoch.

    Args:
        batches: batches of this epoch that are over.
        epoch_batches: batches of the whole epoch; infinite where that is not known.
        accumulation: batches per optimizer step.
        frequency: the `frequency` of the schedule's configuration.

    Returns:
        A whole number of at least 0.
    """
    regular = batches // math.lcm(accumulation, frequency)
    at_the_end = batches == epoch_batches and batches % accumulation != 0 and batches % frequency == 0
    return regular + int(at_the_end)


def _whole(number: float) -> int:
    """The whole part; 4.999999999999999, which a product of decays gives for 5, is 5."""
    nearest = round(number)
    return nearest if abs(number - nearest) <= ROUNDING * max(1, nearest) else math.floor(number)

"""Adam's square-root rule: what keeps the noise of an adaptive optimizer when the batch size changes."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_bayes.functional._validation import ROUNDING, count, positive
from lightning_bayes.functional.configuration import AdamConfiguration, NoSolutionError


def rescale_adam(
    *,
    learning_rate: float,
    batch_size: int,
    target_batch_size: int | None = None,
    target_learning_rate: float | None = None,
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    dataset_size: int | None = None,
) -> AdamConfiguration:
    """The configuration of Adam or RMSprop that follows the same SDE at another batch size.

    B → κB,   ε → ε√κ,   1-β → κ(1-β) for every β,   eps → eps/√κ

    Args:
        learning_rate: ε, above 0.
        batch_size: B, examples per optimizer step; whole.
        target_batch_size: B', so that κ = B'/B. Give this one or `target_learning_rate`.
        target_learning_rate: ε', so that κ = (ε'/ε)².
        betas: every decay rate, each in [0, 1): (β1, β2) of Adam, (alpha,) of RMSprop.
        eps: the constant beside the root mean square, at least 0.
        dataset_size: N if known; only bounds the batch size.

    Returns:
        The new configuration. A solved batch size is not rounded.

    Raises:
        ValueError: naming the argument that is outside its domain; unless exactly one target is given.
        NoSolutionError: a ValueError, if κ(1-β) >= 1 for some β, where the rule has left its domain, or if
            the batch exceeds a known training set.

    Reference:
        Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, NeurIPS 2022,
        arXiv:2205.10287.
    """
    positive("learning_rate", learning_rate)
    present = AdamConfiguration(learning_rate, count("batch_size", batch_size), betas, eps, dataset_size)
    if (target_batch_size is None) == (target_learning_rate is None):
        raise ValueError(
            "Expected exactly one of `target_batch_size` and `target_learning_rate`, but got"
            f" {target_batch_size!r} and {target_learning_rate!r}."
        )
    if target_batch_size is not None:
        return square_root_rule(present, batch_size=count("target_batch_size", target_batch_size))
    return square_root_rule(present, learning_rate=positive("target_learning_rate", target_learning_rate))


def square_root_rule(
    present: AdamConfiguration, *, batch_size: float | None = None, learning_rate: float | None = None
) -> AdamConfiguration:
    """Adam's square-root rule, as `rescale_adam` documents it, for arguments already checked.

    B → κB,   ε → ε√κ,   1-β → κ(1-β) for every β,   eps → eps/√κ

    Args:
        present: the configuration to start from; its learning rate is above 0. For a summed loss, whose gradient is
            b times that of the mean, eps is b times as large too: eps → eps √κ with as many averaged batches.
        batch_size: B', so that κ = B'/B.
        learning_rate: ε', so that κ = (ε'/ε)², in place of `batch_size`. Without either κ is 1.

    Returns:
        The new configuration.

    Raises:
        NoSolutionError: if κ(1-β) >= 1 for some β, or the batch exceeds a known training set.
    """
    # A target is taken as it is: B · (B'/B) and ε √κ can miss it by a rounding.
    if learning_rate is None:
        batch_size = present.batch_size if batch_size is None else batch_size
        kappa = batch_size / present.batch_size
        learning_rate = present.learning_rate * math.sqrt(kappa)
    else:
        ratio = learning_rate / present.learning_rate
        kappa = ratio * ratio
        batch_size = kappa * present.batch_size
    if present.dataset_size is not None and batch_size > present.dataset_size:
        raise NoSolutionError(
            f"The square-root rule asks for a batch of {batch_size:g} examples, more than the training set of"
            f" {present.dataset_size}."
        )
    if batch_size >= present.largest_batch_size * (1 - ROUNDING):  # 1 - 0.9 is not quite 0.1
        raise NoSolutionError(
            f"The square-root rule holds while kappa (1 - beta) < 1: from beta = {min(present.betas):g} below"
            f" a batch of {present.largest_batch_size:g}, but kappa = {kappa:g} asks for"
            f" {batch_size:g}. Use a smaller batch, or a beta closer to 1."
        )
    return replace(
        present,
        learning_rate=learning_rate,
        batch_size=batch_size,
        betas=tuple(1 - kappa * (1 - beta) for beta in present.betas),
        eps=present.eps * math.sqrt(kappa) if present.reduction == "sum" else present.eps / math.sqrt(kappa),
    )

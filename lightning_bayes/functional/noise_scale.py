"""The SGD noise scale, its two inverses, and what Adam keeps instead."""

import math

from lightning_bayes.functional._validation import (
    batch_within_dataset,
    count,
    fraction,
    non_negative,
    positive,
)


def sgd_noise_scale(
    learning_rate: float,
    batch_size: int,
    dataset_size: int,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> float:
    """The noise scale of SGD with momentum: the temperature of its random walk about a minimum.

    g = ε (N/B - 1) (1 - τ) / (1 - m)

    The -1 is the share of sampling without replacement: at full batch (B = N) there is no noise and g is
    exactly 0. Nesterov momentum has the same steady state. With τ = 0 this is the paper's equation.

    Args:
        learning_rate: ε, step length on the **mean** loss of a batch; above 0.
        batch_size: B, examples per optimizer step (loader batch x accumulation x replicas); whole, 1 to N.
        dataset_size: N, training examples; whole.
        momentum: m, in [0, 1).
        dampening: τ as in `torch.optim.SGD`, in [0, 1). Note that `torch.optim.SGD` ignores it at m = 0.

    Returns:
        g >= 0, in the unit of the learning rate.

    Raises:
        ValueError: naming the argument, if one is not a number, not finite or outside its domain.

    Reference:
        Smith & Le, A Bayesian Perspective on Generalization and Stochastic Gradient Descent, ICLR 2018,
        arXiv:1710.06451, section 5; momentum by the same authors' steady-state argument.
    """
    epsilon = positive("learning_rate", learning_rate)
    batch, examples = _sizes(batch_size, dataset_size)
    factor = momentum_factor(momentum, dampening)
    return steady_state_noise_scale(epsilon, batch, examples, factor)


def steady_state_noise_scale(
    learning_rate: float, batch_size: float, dataset_size: int, momentum_factor: float
) -> float:
    """The formula of `sgd_noise_scale` alone, for arguments already checked; B need not be whole.

    g = ε (N/B - 1) · momentum_factor

    Args:
        learning_rate: ε, at least 0.
        batch_size: B, in (0, N].
        dataset_size: N.
        momentum_factor: (1 - τ)/(1 - m), from `momentum_factor`.

    Returns:
        g >= 0.
    """
    # (N - B)/B rather than N/B - 1: the difference of two whole numbers is exact however close B is to N.
    return learning_rate * ((dataset_size - batch_size) / batch_size) * momentum_factor


def momentum_factor(momentum: float, dampening: float) -> float:
    """How many steps' worth of displacement one gradient causes in the end.

    (1 - τ) / (1 - m)

    Args:
        momentum: m, in [0, 1).
        dampening: τ, in [0, 1).

    Returns:
        A number above 0; 1 without momentum and dampening.

    Raises:
        ValueError: naming the argument that is outside [0, 1).
    """
    return (1 - fraction("dampening", dampening)) / (1 - fraction("momentum", momentum))


def batch_size_for_noise_scale(
    noise_scale: float,
    learning_rate: float,
    dataset_size: int,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> float:
    """The batch size at which SGD has a given noise scale: the exact inverse of `sgd_noise_scale` in B.

    B = N / (1 + g (1 - m) / (ε (1 - τ)))

    For B ≪ N it is the linear rule B ∝ εN/(1 - m).

    Args:
        noise_scale: g, in the unit of the learning rate; at least 0. 0 asks for the full batch.
        learning_rate: ε, above 0.
        dataset_size: N, training examples; whole.
        momentum: m, in [0, 1).
        dampening: τ, in [0, 1).

    Returns:
        B in examples, **not rounded**, in (0, N]. Round it before use; below 1 no batch has so much noise.

    Raises:
        ValueError: naming the argument, if one is not a number, not finite or outside its domain.

    Reference:
        Smith & Le, ICLR 2018, arXiv:1710.06451, section 5.
    """
    scale = non_negative("noise_scale", noise_scale)
    epsilon = positive("learning_rate", learning_rate)
    examples = count("dataset_size", dataset_size)
    factor = momentum_factor(momentum, dampening)
    return examples / (1 + scale / (epsilon * factor))


def learning_rate_for_noise_scale(
    noise_scale: float,
    batch_size: int,
    dataset_size: int,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> float:
    """The learning rate at which SGD has a given noise scale: the exact inverse in ε.

    ε = g (1 - m) / ((N/B - 1) (1 - τ))

    Args:
        noise_scale: g, in the unit of the learning rate; above 0 (below the full batch only a learning rate
            of 0, which does not train, has no noise).
        batch_size: B, examples per optimizer step; whole, 1 to N - 1.
        dataset_size: N, training examples; whole.
        momentum: m, in [0, 1).
        dampening: τ, in [0, 1).

    Returns:
        ε > 0.

    Raises:
        ValueError: naming the argument, if one is not a number, not finite or outside its domain; also at
            B = N, where every learning rate has g = 0 and none has another.

    Reference:
        Smith & Le, ICLR 2018, arXiv:1710.06451, section 5.
    """
    scale = positive("noise_scale", noise_scale)
    batch, examples = _sizes(batch_size, dataset_size)
    factor = momentum_factor(momentum, dampening)
    if batch == examples:
        raise ValueError(
            f"Expected argument `batch_size` to be below `dataset_size` ({examples}), but got {batch}:"
            " at full batch the noise scale is 0 at every learning rate, so no learning rate has another."
        )
    return steady_state_learning_rate(scale, batch, examples, factor)


def steady_state_learning_rate(
    noise_scale: float, batch_size: float, dataset_size: int, momentum_factor: float
) -> float:
    """The formula of `learning_rate_for_noise_scale` alone, for checked arguments; B need not be whole.

    ε = g / ((N/B - 1) · momentum_factor)

    Args:
        noise_scale: g, at least 0.
        batch_size: B, in (0, N).
        dataset_size: N.
        momentum_factor: (1 - τ)/(1 - m), from `momentum_factor`.

    Returns:
        ε >= 0.
    """
    return noise_scale / (((dataset_size - batch_size) / batch_size) * momentum_factor)


def adam_noise_scale(learning_rate: float, batch_size: int) -> float:
    """The quantity that Adam's square-root rule keeps constant, in place of the SGD noise scale.

    ε / √B

    Adam and RMSprop divide the gradient by its own root mean square, which the noise dominates in small
    batches and which falls as 1/√B. Their SDE is the same under B → κB with ε → ε√κ, 1-β → κ(1-β) and
    eps → eps/√κ; so ε√κ / √(κB) = ε/√B stays. It compares runs of one optimizer with betas moved along; it
    is not on the scale of `sgd_noise_scale`.

    Args:
        learning_rate: ε, above 0.
        batch_size: B, examples per optimizer step; whole, at least 1.

    Returns:
        ε/√B > 0.

    Raises:
        ValueError: naming the argument, if one is not a number, not finite or outside its domain.

    Reference:
        Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, NeurIPS 2022,
        arXiv:2205.10287.
    """
    return positive("learning_rate", learning_rate) / math.sqrt(count("batch_size", batch_size))


def _sizes(batch_size: object, dataset_size: object) -> tuple[int, int]:
    batch, examples = count("batch_size", batch_size), count("dataset_size", dataset_size)
    batch_within_dataset("batch_size", batch, "dataset_size", examples)
    return batch, examples

"""The gradient noise of McCandlish et al.: from per-example gradients, from sums of them, from two batch sizes."""

import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from lightning_bayes.functional._validation import count, non_negative, positive


@dataclass(frozen=True)
class GradientNoise:
    """The noise in the gradients of a batch, or its average over batches.

    Attributes:
        trace: unbiased tr Σ, the summed variance of a per-example gradient.
        squared_norm: unbiased ‖G‖² of the mean gradient; it can be negative where noise dominates.
        noise_scale: B_simple = tr Σ / ‖G‖² in examples; NaN where `squared_norm` is not positive, that is
            where the batches do not resolve it.
    """

    trace: float
    squared_norm: float
    noise_scale: float

    @classmethod
    def of(cls, trace: float, squared_norm: float) -> Self:
        """Divide the one by the other, once.

        Args:
            trace: tr Σ, of one batch or averaged.
            squared_norm: ‖G‖², of the same.
        """
        return cls(trace, squared_norm, trace / squared_norm if squared_norm > 0 else math.nan)

    @property
    def resolved(self) -> bool:
        """Whether `noise_scale` is a number."""
        return not math.isnan(self.noise_scale)


def gradient_noise_scale(per_example_gradients: Tensor) -> GradientNoise:
    """The simple noise scale of McCandlish et al. from the per-example gradients of one batch.

    tr Σ = Σᵢ ‖gᵢ - ḡ‖² / (B - 1),    ‖G‖² = ‖ḡ‖² - tr Σ / B,    B_simple = tr Σ / ‖G‖²

    Nothing is clamped, so `trace` and `squared_norm` can be averaged over steps; divide the averages once
    (`GradientNoise.of`). The ratio of one batch is biased, and averaging such ratios is wrong.

    Args:
        per_example_gradients: `[B, p]`, one row per example, gradients of each example's own loss (without
            the 1/B of a mean loss); B >= 2.

    Returns:
        The two unbiased parts and their ratio.

    Raises:
        ValueError: if the argument is not a real floating-point matrix with two rows and one column or more.

    Reference:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018, arXiv:1812.06162, appendix A.
    """
    _check_gradients(per_example_gradients)
    batch_size = per_example_gradients.shape[0]
    mean = per_example_gradients.mean(dim=0)
    # Equal to (sum |g_i|^2 - B |mean|^2)/(B - 1), without the cancellation where gradients nearly agree.
    trace = (per_example_gradients - mean).square().sum().item() / (batch_size - 1)
    return GradientNoise.of(trace, mean.square().sum().item() - trace / batch_size)


def gradient_noise_scale_from_sums(
    sum_of_squared_norms: float, squared_norm_of_mean: float, batch_size: int
) -> GradientNoise:
    """`gradient_noise_scale` from what is left of the gradients when they are never formed.

    tr Σ = (Σᵢ ‖gᵢ‖² - B ‖ḡ‖²) / (B - 1),    ‖G‖² = ‖ḡ‖² - tr Σ / B

    Args:
        sum_of_squared_norms: Σᵢ ‖gᵢ‖², at least 0.
        squared_norm_of_mean: ‖ḡ‖², at least 0.
        batch_size: B, whole, at least 2.

    Returns:
        The two unbiased parts and their ratio.

    Raises:
        ValueError: naming the argument that is outside its domain.

    Reference:
        McCandlish et al., 2018, arXiv:1812.06162, appendix A.1.
    """
    examples = count("batch_size", batch_size)
    if examples < 2:
        raise ValueError(
            f"Expected argument `batch_size` to be at least 2, but got {batch_size!r}: one gradient has no spread."
        )
    mean_square = non_negative("sum_of_squared_norms", sum_of_squared_norms) / examples
    return gradient_noise_scale_from_batches(mean_square, 1, squared_norm_of_mean, examples)


def gradient_noise_scale_from_batches(
    small_squared_norm: float,
    small_batch_size: float,
    large_squared_norm: float,
    large_batch_size: float,
) -> GradientNoise:
    """The simple noise scale from gradients of two batch sizes b < B.

    tr Σ = (‖g_b‖² - ‖g_B‖²) / (1/b - 1/B),    ‖G‖² = (B ‖g_B‖² - b ‖g_b‖²) / (B - b)

    Both are unbiased whether or not the large batch holds the small ones, because E‖g_b‖² = ‖G‖² + tr Σ / b.
    With `small_squared_norm` the mean over the micro-batches of an accumulation, or over data-parallel
    replicas, these estimates are for nothing. For micro-batches of unequal sizes that count alike in the
    large gradient, b is the harmonic mean of their k sizes and B = k b.

    Args:
        small_squared_norm: ‖g_b‖² of the mean gradient of b examples, or an average of such; at least 0.
        small_batch_size: b, above 0.
        large_squared_norm: ‖g_B‖², at least 0.
        large_batch_size: B, above b.

    Returns:
        The two unbiased parts and their ratio.

    Raises:
        ValueError: naming the argument that is outside its domain.

    Reference:
        McCandlish et al., 2018, arXiv:1812.06162, appendix A.1.
    """
    small, large = (
        positive("small_batch_size", small_batch_size),
        positive("large_batch_size", large_batch_size),
    )
    if small >= large:
        raise ValueError(
            f"Expected argument `small_batch_size` to be below `large_batch_size` ({large:g}), but got {small:g}:"
            " one batch size does not tell noise from gradient."
        )
    of_small = non_negative("small_squared_norm", small_squared_norm)
    of_large = non_negative("large_squared_norm", large_squared_norm)
    trace = (of_small - of_large) / (1 / small - 1 / large)
    # Equal to (B |g_B|^2 - b |g_b|^2)/(B - b).
    return GradientNoise.of(trace, of_large - trace / large)


def _check_gradients(gradients: object) -> None:
    got = type(gradients).__name__
    if isinstance(gradients, Tensor):
        rows, columns = gradients.shape if gradients.ndim == 2 else (0, 0)
        if rows >= 2 and columns >= 1 and gradients.is_floating_point():
            return
        got = f"{gradients.dtype} of shape {list(gradients.shape)}"
    raise ValueError(
        "Expected argument `per_example_gradients` to be a floating-point tensor [B, p] with B >= 2, p >= 1, but got "
        f"{got}."
    )

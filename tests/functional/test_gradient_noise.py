"""The estimators against the literal sums, against a known answer, and against each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bayes.functional import (
    GradientNoise,
    gradient_noise_scale,
    gradient_noise_scale_from_batches,
    gradient_noise_scale_from_sums,
)
from tests.refusals import refuses


def draws(seed, *shape, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) + mean


def within_four_standard_errors(values, truth):
    values = torch.tensor(values, dtype=torch.float64)
    return abs(values.mean().item() - truth) < 4 * values.std().item() / math.sqrt(len(values))


def test_against_the_literal_sums():
    gradients = draws(0, 6, 5, mean=1)
    batch_size = len(gradients)
    mean = sum(gradients) / batch_size
    squares = sum(float((gradient**2).sum()) for gradient in gradients)
    trace = (squares - batch_size * float((mean**2).sum())) / (batch_size - 1)
    squared_norm = float((mean**2).sum()) - trace / batch_size

    noise = gradient_noise_scale(gradients)

    assert noise.trace == pytest.approx(trace, rel=1e-12)
    assert noise.squared_norm == pytest.approx(squared_norm, rel=1e-12)
    assert noise.noise_scale == pytest.approx(trace / squared_norm, rel=1e-12)


@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**16), st.floats(-3, 3))
def test_sums_say_the_same_as_the_gradients(batch_size, parameters, seed, mean):
    gradients = draws(seed, batch_size, parameters, mean=mean)
    whole = gradient_noise_scale(gradients)
    squared_norm_of_mean = gradients.mean(0).square().sum().item()
    sums = gradient_noise_scale_from_sums(gradients.square().sum().item(), squared_norm_of_mean, batch_size)
    scale = gradients.square().sum().item()  # what both parts are differences of
    assert sums.trace == pytest.approx(whole.trace, rel=1e-9, abs=1e-12 * scale)
    assert sums.squared_norm == pytest.approx(whole.squared_norm, rel=1e-9, abs=1e-12 * scale)


@given(st.floats(0, 1e6), st.integers(1, 1000), st.floats(0, 1e6), st.integers(2, 1000))
def test_two_batch_sizes_are_mccandlish_s_equations(small_norm, small, large_norm, factor):
    large = small * factor
    noise = gradient_noise_scale_from_batches(small_norm, small, large_norm, large)
    squared_norm = (large * large_norm - small * small_norm) / (large - small)
    trace = (small_norm - large_norm) / (1 / small - 1 / large)
    largest = max(small_norm, large_norm)
    assert noise.trace == pytest.approx(trace, rel=1e-9, abs=1e-9 * largest * small)
    assert noise.squared_norm == pytest.approx(squared_norm, rel=1e-9, abs=1e-9 * largest)


# G = (0.5, 0.5, 0.5) and Σ = diag(1, 4, 9): tr Σ = 14, |G|² = 0.75, B_simple = 18.7.
STEPS, TRACE, SQUARED_NORM = 4000, 14.0, 0.75


def batches(batch_size):
    return 0.5 + draws(1, STEPS, batch_size, 3) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def from_groups(batch, sizes):
    """Micro-batches of these sizes, each of which counts alike in the large gradient."""
    means = torch.stack([part.mean(0) for part in batch.split(sizes)])
    harmonic = len(sizes) / sum(1 / size for size in sizes)
    small = means.square().sum(1).mean().item()
    large = means.mean(0).square().sum().item()
    return gradient_noise_scale_from_batches(small, harmonic, large, len(sizes) * harmonic)


ESTIMATORS = {
    "per example": gradient_noise_scale,
    "two micro-batches": lambda batch: from_groups(batch, [4, 4]),
    "unequal micro-batches": lambda batch: from_groups(batch, [4, 3, 1]),
    "small inside large": lambda batch: gradient_noise_scale_from_batches(
        batch[:2].mean(0).square().sum().item(), 2, batch.mean(0).square().sum().item(), 8
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_unbiased(name):
    found = [ESTIMATORS[name](batch) for batch in batches(8)]
    assert within_four_standard_errors([noise.trace for noise in found], TRACE)
    assert within_four_standard_errors([noise.squared_norm for noise in found], SQUARED_NORM)


def test_averages_are_divided_once_and_nothing_is_clamped_before():
    found = [gradient_noise_scale(batch) for batch in batches(8)]
    trace = sum(noise.trace for noise in found) / STEPS
    squared_norms = torch.tensor([noise.squared_norm for noise in found])
    assert GradientNoise.of(trace, squared_norms.mean().item()).noise_scale == pytest.approx(
        TRACE / SQUARED_NORM, rel=0.1
    )
    # What others do: too small by far, and without a mean to speak of.
    clamped = trace / squared_norms.clamp(min=0).mean().item()
    assert clamped < 0.75 * TRACE / SQUARED_NORM
    assert not within_four_standard_errors(squared_norms.clamp(min=0).tolist(), SQUARED_NORM)
    ratios = torch.tensor([noise.trace for noise in found]) / squared_norms
    assert ratios.std() > 5 * TRACE / SQUARED_NORM
    assert ratios.min() < 0


def test_unresolved_is_nan_and_not_clamped():
    noise = gradient_noise_scale(torch.tensor([[1.0], [-1.0]]))
    assert noise.trace == 2.0
    assert noise.squared_norm == -1.0
    assert math.isnan(noise.noise_scale)
    assert not noise.resolved
    assert GradientNoise.of(0.0, 1.0).resolved


@pytest.mark.parametrize(
    "gradients",
    [torch.zeros(1, 3), torch.zeros(3), torch.zeros(3, 0), torch.zeros(2, 2, dtype=torch.long), [[1.0]]],
)
def test_bad_gradients(gradients):
    with refuses("`per_example_gradients`"):
        gradient_noise_scale(gradients)


NUMBERS = [-1.0, math.nan, math.inf, True, "1", None]


@pytest.mark.parametrize(
    ("function", "good", "bad"),
    [
        (
            gradient_noise_scale_from_sums,
            {"sum_of_squared_norms": 3.0, "squared_norm_of_mean": 1.0, "batch_size": 4},
            {"sum_of_squared_norms": NUMBERS, "batch_size": [1, 0, 2.5, *NUMBERS]},
        ),
        (
            gradient_noise_scale_from_batches,
            {
                "small_squared_norm": 3.0,
                "small_batch_size": 2,
                "large_squared_norm": 1.0,
                "large_batch_size": 4,
            },
            {
                "small_squared_norm": NUMBERS,
                "large_squared_norm": NUMBERS,
                "small_batch_size": [0, 4, 5, *NUMBERS],
                "large_batch_size": [0, *NUMBERS],
            },
        ),
    ],
)
def test_bad_input_is_named(function, good, bad):
    function(**good)
    for name, values in bad.items():
        for value in values:
            with refuses(f"Expected argument `{name}` to be", value):
                function(**(good | {name: value}))

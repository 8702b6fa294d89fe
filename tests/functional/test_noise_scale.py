import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bayes.functional import (
    adam_noise_scale,
    batch_size_for_noise_scale,
    learning_rate_for_noise_scale,
    sgd_noise_scale,
)
from tests.refusals import refuses

# The inverses are a handful of float64 operations.
RELATIVE = 1e-9

learning_rates = st.floats(1e-6, 10.0)
momenta = st.floats(0.0, 0.999)
dampenings = st.floats(0.0, 0.999)


@st.composite
def sizes(draw, largest=1_000_000, full_batch=False):
    dataset_size = draw(st.integers(2, largest))
    batch_size = draw(st.integers(1, dataset_size if full_batch else dataset_size - 1))
    return batch_size, dataset_size


def test_value_by_hand():
    # 0.1 * (1000/32 - 1) / (1 - 0.9) = 0.1 * 30.25 * 10
    assert sgd_noise_scale(0.1, 32, 1000, 0.9) == pytest.approx(30.25, rel=1e-12)
    assert sgd_noise_scale(0.1, 32, 1000, 0.9, 0.9) == pytest.approx(3.025, rel=1e-12)
    assert isinstance(sgd_noise_scale(1, 1, 2), float)


@given(learning_rates, sizes(full_batch=True), momenta, dampenings)
def test_batch_size_round_trips(learning_rate, batch_and_data, momentum, dampening):
    batch_size, dataset_size = batch_and_data
    scale = sgd_noise_scale(learning_rate, batch_size, dataset_size, momentum, dampening)
    found = batch_size_for_noise_scale(scale, learning_rate, dataset_size, momentum, dampening)
    assert found == pytest.approx(batch_size, rel=RELATIVE)


@given(learning_rates, sizes(), momenta, dampenings)
def test_learning_rate_round_trips(learning_rate, batch_and_data, momentum, dampening):
    batch_size, dataset_size = batch_and_data
    scale = sgd_noise_scale(learning_rate, batch_size, dataset_size, momentum, dampening)
    found = learning_rate_for_noise_scale(scale, batch_size, dataset_size, momentum, dampening)
    assert found == pytest.approx(learning_rate, rel=RELATIVE)


@given(st.floats(1e-6, 1e6), sizes(), momenta, dampenings)
def test_noise_scale_round_trips_through_the_learning_rate(scale, batch_and_data, momentum, dampening):
    batch_size, dataset_size = batch_and_data
    learning_rate = learning_rate_for_noise_scale(scale, batch_size, dataset_size, momentum, dampening)
    found = sgd_noise_scale(learning_rate, batch_size, dataset_size, momentum, dampening)
    assert found == pytest.approx(scale, rel=RELATIVE)


@given(learning_rates, st.integers(1, 10**12), momenta, dampenings)
def test_full_batch_has_no_noise(learning_rate, dataset_size, momentum, dampening):
    assert sgd_noise_scale(learning_rate, dataset_size, dataset_size, momentum, dampening) == 0.0
    assert batch_size_for_noise_scale(0.0, learning_rate, dataset_size, momentum, dampening) == dataset_size


@given(learning_rates, st.integers(2, 10**9), momenta)
def test_one_example_short_of_the_full_batch(learning_rate, dataset_size, momentum):
    # B ~ N: the difference N - B must not be lost in rounding.
    expected = learning_rate / (dataset_size - 1) / (1 - momentum)
    found = sgd_noise_scale(learning_rate, dataset_size - 1, dataset_size, momentum)
    assert found == pytest.approx(expected, rel=1e-12)


@given(learning_rates, sizes(), momenta, dampenings)
def test_dampening_multiplies(learning_rate, batch_and_data, momentum, dampening):
    damped = sgd_noise_scale(learning_rate, *batch_and_data, momentum, dampening)
    assert damped == pytest.approx(
        (1 - dampening) * sgd_noise_scale(learning_rate, *batch_and_data, momentum), rel=RELATIVE
    )


@given(learning_rates, sizes(), st.floats(0.0, 0.9), st.floats(0.0, 0.9))
def test_monotone_in_each_argument(learning_rate, batch_and_data, momentum, dampening):
    batch_size, dataset_size = batch_and_data
    scale = sgd_noise_scale(learning_rate, batch_size, dataset_size, momentum, dampening)
    assert sgd_noise_scale(2 * learning_rate, batch_size, dataset_size, momentum, dampening) > scale
    assert sgd_noise_scale(learning_rate, batch_size + 1, dataset_size, momentum, dampening) < scale
    assert sgd_noise_scale(learning_rate, batch_size, dataset_size + 1, momentum, dampening) > scale
    assert sgd_noise_scale(learning_rate, batch_size, dataset_size, momentum + 0.05, dampening) > scale
    assert sgd_noise_scale(learning_rate, batch_size, dataset_size, momentum, dampening + 0.05) < scale


NOT_POSITIVE = [0, -1.0, math.nan, math.inf, -math.inf, True, "0.1", None, torch.tensor(0.1), 10**400]
NOT_COUNT = [*NOT_POSITIVE, 32.5, 0.5]
NOT_FRACTION = [1, 1.0, -0.1, math.nan, math.inf, False, "0.9", None]
NOT_NON_NEGATIVE = [-1.0, math.nan, math.inf, True, "1", None]
GOOD = {"learning_rate": 0.1, "batch_size": 32, "dataset_size": 1000, "momentum": 0.9, "dampening": 0.1}
WITHOUT_BATCH = {key: value for key, value in GOOD.items() if key != "batch_size"} | {"noise_scale": 3.0}
WITHOUT_RATE = {key: value for key, value in GOOD.items() if key != "learning_rate"} | {"noise_scale": 3.0}
BAD = {
    "learning_rate": NOT_POSITIVE,
    "batch_size": NOT_COUNT,
    "dataset_size": NOT_COUNT,
    "momentum": NOT_FRACTION,
    "dampening": NOT_FRACTION,
}


@pytest.mark.parametrize(
    ("function", "good", "bad"),
    [
        (sgd_noise_scale, GOOD, BAD),
        (batch_size_for_noise_scale, WITHOUT_BATCH, BAD | {"noise_scale": NOT_NON_NEGATIVE}),
        (learning_rate_for_noise_scale, WITHOUT_RATE, BAD | {"noise_scale": NOT_POSITIVE}),
        (adam_noise_scale, {"learning_rate": 0.1, "batch_size": 32}, BAD),
    ],
)
def test_bad_input_is_named(function, good, bad):
    function(**good)
    for name in good:
        for value in bad[name]:
            with refuses(f"Expected argument `{name}` to be", value):
                function(**(good | {name: value}))


def test_integral_floats_are_sizes():
    assert sgd_noise_scale(0.1, 32.0, 1000.0) == sgd_noise_scale(0.1, 32, 1000)


def test_batch_beyond_the_dataset_is_an_error():
    with refuses("`batch_size` to be at most `dataset_size`", remedy="1001"):
        sgd_noise_scale(0.1, 1001, 1000)
    with refuses("`batch_size` to be at most `dataset_size`"):
        learning_rate_for_noise_scale(1.0, 1001, 1000)


def test_no_learning_rate_gives_the_full_batch_noise():
    with refuses("`batch_size` to be below `dataset_size`"):
        learning_rate_for_noise_scale(1.0, 1000, 1000)


@given(learning_rates, st.integers(1, 10**6), st.integers(1, 100))
def test_adam_keeps_its_scale_under_the_square_root_rule(learning_rate, batch_size, kappa):
    scaled = adam_noise_scale(learning_rate * math.sqrt(kappa), batch_size * kappa)
    assert scaled == pytest.approx(adam_noise_scale(learning_rate, batch_size), rel=RELATIVE)

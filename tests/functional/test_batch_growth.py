import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_bayes.functional import (
    adam_noise_scale,
    grow_batch,
    learning_rate_gain,
    sgd_noise_scale,
)
from lightning_bayes.functional.batch_growth import schedule_steps
from tests.refusals import refuses

# The formulas are a handful of float64 operations.
RELATIVE = 1e-9
learning_rates, momenta = st.floats(1e-6, 10.0), st.floats(0.0, 0.999)
methods = st.sampled_from(["accumulate", "reload"])


@st.composite
def growths(draw, rules=("linear", "exact", "sqrt")):
    """A decay and everything that `grow_batch` takes, within its domain."""
    device, accumulation, replicas = (draw(st.integers(1, largest)) for largest in (64, 4, 4))
    present = device * accumulation * replicas
    dataset_size = draw(st.integers(2 * present + 1, 200 * present))
    arguments = {
        "device_batch_size": device,
        "accumulation": accumulation,
        "replicas": replicas,
        "dataset_size": dataset_size,
        "max_batch_size": draw(st.none() | st.integers(1, dataset_size - 1)),
        "max_device_batch_size": draw(st.none() | st.integers(device, 10 * device)),
        "method": draw(methods),
        "rule": draw(st.sampled_from(rules)),
    }
    return draw(st.floats(1.0, 1e4)), present, arguments


def test_the_papers_schedule():
    # Smith et al. 2018, section 5.1: the learning rate divided by 5 three times, B = 128 on CIFAR-10's 50,000.
    batches = [grow_batch(5.0**k, device_batch_size=128, dataset_size=50_000) for k in range(4)]
    assert [growth.batch_size for growth in batches] == [128, 640, 3200, 4992]  # 39 x 128 is within N/10
    assert [growth.learning_rate_factor for growth in batches] == [1, 1, 1, 4992 / 128 / 125]
    assert [growth.limited for growth in batches] == [False, False, False, True]


@given(growths(rules=("exact",)), learning_rates, momenta)
def test_exact_keeps_the_noise_scale_of_the_decayed_run(growth, learning_rate, momentum):
    decay, present, arguments = growth
    found, examples = grow_batch(decay, **arguments), arguments["dataset_size"]
    decayed = sgd_noise_scale(learning_rate / decay, present, examples, momentum)
    grown = learning_rate * found.learning_rate_factor
    assert sgd_noise_scale(grown, found.batch_size, examples, momentum) == pytest.approx(
        decayed, rel=RELATIVE
    )


@given(growths(rules=("linear",)), learning_rates)
def test_linear_keeps_learning_rate_over_batch_size(growth, learning_rate):
    decay, present, arguments = growth
    found = grow_batch(decay, **arguments)
    grown = learning_rate * found.learning_rate_factor
    assert grown / found.batch_size == pytest.approx(learning_rate / decay / present, rel=RELATIVE)


@given(growths(rules=("sqrt",)), learning_rates)
def test_sqrt_keeps_what_adam_keeps(growth, learning_rate):
    decay, present, arguments = growth
    found = grow_batch(decay, **arguments)
    grown = adam_noise_scale(learning_rate * found.learning_rate_factor, found.batch_size)
    assert grown == pytest.approx(adam_noise_scale(learning_rate / decay, present), rel=RELATIVE)


@given(growths())
def test_batch_is_made_up_within_its_limits(growth):
    decay, present, arguments = growth
    found = grow_batch(decay, **arguments)
    replicas, memory = arguments["replicas"], arguments["max_device_batch_size"]
    assert found.batch_size == found.device_batch_size * found.accumulation * replicas
    limit = arguments["max_batch_size"] or max(1, arguments["dataset_size"] // 10)
    assert present * 0.5 < found.batch_size <= max(present, limit)
    assert memory is None or found.device_batch_size <= memory
    if arguments["method"] == "accumulate":
        assert found.device_batch_size == arguments["device_batch_size"]
        assert found.batch_size >= present
    power = 2 if arguments["rule"] == "sqrt" else 1
    assert found.batch_size <= present * decay**power * (1 + 1e-9)
    # No learning rate beyond the one before the decay, but for the -1 of the exact rule.
    bound = 1 / (1 - found.batch_size / arguments["dataset_size"]) if arguments["rule"] == "exact" else 1
    assert found.learning_rate_factor <= bound * (1 + 1e-9)


@given(growths())
def test_no_decay_is_no_growth(growth):
    _, present, arguments = growth
    found = grow_batch(1.0, **arguments)
    assert found.learning_rate_gain == found.learning_rate_factor == 1
    assert (found.device_batch_size, found.accumulation) == (
        arguments["device_batch_size"],
        arguments["accumulation"],
    )
    assert found.batch_size == present and not found.limited


@given(growths())
def test_a_learning_rate_of_zero_asks_for_the_largest_batch(growth):
    _, _, arguments = growth
    found = grow_batch(math.inf, **arguments)
    assert found.limited and found.learning_rate_factor == 0
    assert found.batch_size == grow_batch(1e12, **arguments).batch_size


@given(growths(), st.floats(1.0, 10.0))
def test_a_larger_decay_never_shrinks_an_accumulated_batch(growth, further):
    decay, _, arguments = growth
    assume(arguments["method"] == "accumulate")
    smaller, larger = grow_batch(decay, **arguments), grow_batch(decay * further, **arguments)
    assert larger.batch_size >= smaller.batch_size


def test_a_product_of_decays_that_misses_a_whole_number_by_rounding_does_not_miss_a_batch():
    decay = 0.1 / (0.1 * 0.2 * 0.2 * 0.2)
    assert decay != 125
    found = grow_batch(decay, device_batch_size=4, dataset_size=10_000)
    assert found.accumulation == 125
    assert found.learning_rate_factor == pytest.approx(1, rel=1e-12)


def test_memory_is_kept_by_accumulating():
    arguments = {"device_batch_size": 32, "dataset_size": 60_000, "method": "reload"}
    found = grow_batch(25, max_device_batch_size=256, **arguments)
    assert (found.device_batch_size, found.accumulation) == (200, 4)
    assert grow_batch(25, **arguments).device_batch_size == 800


def test_batch_size_of_another_number_of_devices():
    # 4 x 8 on one device went on with two: 16 batches of 4 would be 64 on one, 8 on each of two.
    found = grow_batch(2, device_batch_size=4, replicas=2, batch_size=32, dataset_size=10_000)
    assert (found.batch_size, found.accumulation, found.learning_rate_factor) == (64, 8, 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"decay": 0.5}, "`decay` to be a number of at least 1"),
        ({"decay": math.nan}, "`decay`"),
        ({"device_batch_size": 0}, "`device_batch_size`"),
        ({"accumulation": 1.5}, "`accumulation`"),
        ({"replicas": 0}, "`replicas`"),
        ({"dataset_size": 0}, "`dataset_size`"),
        ({"batch_size": -1}, "`batch_size`"),
        ({"max_batch_size": 101}, "`max_batch_size` to be at most `dataset_size`"),
        (
            {"max_device_batch_size": 4},
            "at least the batch of the loader to start with (10 examples), but got 4",
        ),
        ({"method": "grow"}, "`method`"),
        ({"rule": "cubic"}, "`rule`"),
        ({"rule": "exact", "max_batch_size": 100, "decay": 1e9}, "at full batch"),
    ],
)
def test_wrong_arguments_are_named(change, match):
    arguments = {"decay": 2.0, "device_batch_size": 10, "dataset_size": 100} | change
    with refuses(match):
        grow_batch(arguments.pop("decay"), **arguments)


def test_gain_by_hand():
    assert learning_rate_gain(32, 160, 4000) == 5
    assert learning_rate_gain(32, 160, 4000, "sqrt") == math.sqrt(5)
    # (4000/32 - 1)/(4000/160 - 1) = 124/24
    assert learning_rate_gain(32, 160, 4000, "exact") == pytest.approx(124 / 24, rel=1e-12)
    assert learning_rate_gain(32, 32, 32, "exact") == 1


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 6))
def test_schedule_steps_are_those_of_lightnings_loop(epoch_batches, accumulation, frequency):
    taken = 0
    for batch in range(1, epoch_batches + 1):
        stepped = batch % accumulation == 0 or batch == epoch_batches
        taken += stepped and batch % frequency == 0
        assert schedule_steps(batch, epoch_batches, accumulation, frequency) == taken

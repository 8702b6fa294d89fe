import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bayes.functional import (
    AdamConfiguration,
    Configuration,
    NoSolutionError,
    advise,
    advise_adam,
    rescale,
    rescale_adam,
    sgd_noise_scale,
)
from tests.refusals import refuses

RELATIVE = 1e-9
PRESENT = {"learning_rate": 0.1, "batch_size": 32, "dataset_size": 1000, "momentum": 0.9}
CONFIGURATION = Configuration(**PRESENT)

learning_rates = st.floats(1e-5, 10.0)
batch_sizes = st.integers(1, 999)
momenta = st.floats(0.0, 0.99)
dampenings = st.floats(0.0, 0.9)


@given(learning_rates, batch_sizes, momenta, dampenings, batch_sizes, momenta, st.integers(1000, 10**6))
def test_exact_learning_rate_keeps_the_noise_scale(
    learning_rate, batch_size, momentum, dampening, target_batch, target_momentum, target_data
):
    present = Configuration(learning_rate, batch_size, 1000, momentum, dampening)
    found = rescale(
        learning_rate=learning_rate,
        batch_size=batch_size,
        dataset_size=1000,
        momentum=momentum,
        dampening=dampening,
        target_batch_size=target_batch,
        target_momentum=target_momentum,
        target_dataset_size=target_data,
    )
    assert (found.batch_size, found.momentum, found.dataset_size) == (
        target_batch,
        target_momentum,
        target_data,
    )
    assert found.noise_scale == pytest.approx(present.noise_scale, rel=RELATIVE)


@given(learning_rates, batch_sizes, momenta, learning_rates)
def test_exact_batch_size_inverts_the_exact_learning_rate(learning_rate, batch_size, momentum, target):
    there = rescale(
        learning_rate=learning_rate,
        batch_size=batch_size,
        dataset_size=1000,
        momentum=momentum,
        target_learning_rate=target,
    )
    # The other way round, the ratio of noise to sampling is (N - B)/B of the solved, real-valued B.
    back = target * ((1000 - there.batch_size) / there.batch_size) / ((1000 - batch_size) / batch_size)
    # N - B cancels where B is solved close to N.
    assert back == pytest.approx(learning_rate, rel=1e-9 * max(1, 1000 / (1000 - there.batch_size)))


@given(learning_rates, st.integers(1, 100), momenta, dampenings, st.integers(1, 100), momenta)
def test_exact_tends_to_linear_for_small_batches(
    learning_rate, batch_size, momentum, dampening, target_batch, target_momentum
):
    arguments = dict(
        learning_rate=learning_rate,
        batch_size=batch_size,
        dataset_size=10**9,
        momentum=momentum,
        dampening=dampening,
        target_batch_size=target_batch,
        target_momentum=target_momentum,
    )
    exact, linear = rescale(**arguments), rescale(**arguments, rule="linear")
    # The relative difference is |B' - B|/N.
    assert exact.learning_rate == pytest.approx(linear.learning_rate, rel=1e-6)


def test_linear_by_hand():
    assert rescale(**PRESENT, target_batch_size=512, rule="linear").learning_rate == pytest.approx(1.6)
    assert rescale(**PRESENT, target_learning_rate=0.3, rule="linear").batch_size == pytest.approx(96)
    assert rescale(**PRESENT, target_momentum=0.5, rule="linear").learning_rate == pytest.approx(0.5)
    assert rescale(**PRESENT, target_dataset_size=4000, rule="linear").learning_rate == pytest.approx(0.025)
    batch = rescale(**PRESENT, target_dataset_size=4000, rule="linear", solve_for="batch_size")
    assert batch.batch_size == pytest.approx(128)


def test_exact_by_hand():
    # g = 30.25; 30.25 * 0.1 / (1000/512 - 1) = 3.025 / 0.953125
    assert rescale(**PRESENT, target_batch_size=512).learning_rate == pytest.approx(3.025 / 0.953125)
    # 1000 / (1 + 30.25 * 0.1 / 0.5)
    assert rescale(**PRESENT, target_learning_rate=0.5).batch_size == pytest.approx(1000 / 7.05)


def test_square_root_by_hand():
    assert rescale(**PRESENT, target_batch_size=128, rule="sqrt").learning_rate == pytest.approx(0.2)
    assert rescale(**PRESENT, target_learning_rate=0.2, rule="sqrt").batch_size == pytest.approx(128)


def test_dampening_leaves_with_momentum():
    found = rescale(**PRESENT, dampening=0.5, target_momentum=0.0)
    assert found.dampening == 0.0
    assert found.noise_scale == pytest.approx(sgd_noise_scale(**PRESENT, dampening=0.5))


def test_results_are_frozen():
    with pytest.raises(FrozenInstanceError):
        CONFIGURATION.learning_rate = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "at least one of `target_batch_size`"),
        ({"target_batch_size": 0}, "`target_batch_size`"),
        ({"target_batch_size": 1.5}, "`target_batch_size`"),
        ({"target_batch_size": True}, "`target_batch_size`"),
        ({"target_batch_size": 1001}, "`target_batch_size` to be at most `dataset_size`"),
        ({"target_batch_size": 200, "target_dataset_size": 100}, "at most `target_dataset_size`"),
        ({"target_learning_rate": math.nan}, "`target_learning_rate`"),
        ({"target_learning_rate": 0}, "`target_learning_rate`"),
        ({"target_momentum": 1.0}, "`target_momentum`"),
        ({"target_momentum": "0.9"}, "`target_momentum`"),
        ({"target_dataset_size": -5}, "`target_dataset_size`"),
        ({"target_batch_size": 64, "target_learning_rate": 0.2}, "nothing|to be None"),
        ({"target_batch_size": 64, "rule": "cube"}, "`rule`"),
        ({"target_batch_size": 64, "rule": ["exact"]}, "`rule`"),
        ({"target_batch_size": 64, "solve_for": "batch_size"}, "`solve_for`"),
        ({"target_momentum": 0.5, "rule": "sqrt"}, "`target_momentum`"),
        ({"target_batch_size": 64, "learning_rate": 0.0}, "`learning_rate`"),
        ({"target_batch_size": 64, "batch_size": 32.5}, "`batch_size`"),
        ({"target_batch_size": 64, "batch_size": 2000}, "`batch_size` to be at most"),
        ({"target_batch_size": 64, "momentum": 1}, "`momentum`"),
        ({"target_batch_size": 64, "dampening": -1}, "`dampening`"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        rescale(**(PRESENT | change))


@pytest.mark.parametrize(
    "change",
    [
        {"target_batch_size": 1000},
        {"batch_size": 1000, "target_batch_size": 64},
        {"target_learning_rate": 10.0, "rule": "linear"},
        {"target_dataset_size": 20},
    ],
)
def test_no_solution(change):
    with pytest.raises(NoSolutionError):
        rescale(**(PRESENT | change))


def test_configuration_allows_the_start_of_a_warm_up():
    assert Configuration(0.0, 32, 1000).noise_scale == 0.0
    with refuses("`learning_rate`"):
        Configuration(-0.1, 32, 1000)


def test_adam_by_hand():
    found = rescale_adam(learning_rate=1e-3, batch_size=32, target_batch_size=128, eps=1e-8)
    assert found.learning_rate == pytest.approx(2e-3)
    assert found.betas == pytest.approx((0.6, 0.996))
    assert found.eps == pytest.approx(5e-9)
    assert found.batch_size == 128
    back = rescale_adam(
        learning_rate=2e-3, batch_size=128, target_learning_rate=1e-3, betas=(0.6, 0.996), eps=5e-9
    )
    assert back.batch_size == pytest.approx(32)
    assert back.betas == pytest.approx((0.9, 0.999))


def test_adam_rule_has_a_domain():
    # kappa (1 - 0.9) reaches 1 at kappa = 10.
    assert AdamConfiguration(1e-3, 32).largest_batch_size == pytest.approx(320)
    rescale_adam(learning_rate=1e-3, batch_size=32, target_batch_size=319)
    with refuses("kappa", remedy="320", error=NoSolutionError):
        rescale_adam(learning_rate=1e-3, batch_size=32, target_batch_size=321)
    # In floating point 10 (1 - 0.9) is below 1, and would leave a beta of 2e-16.
    with refuses("kappa", remedy="320", error=NoSolutionError):
        rescale_adam(learning_rate=1e-3, batch_size=32, target_batch_size=320)
    with refuses("exactly one"):
        rescale_adam(learning_rate=1e-3, batch_size=32)
    with refuses("`betas`"):
        rescale_adam(learning_rate=1e-3, batch_size=32, target_batch_size=64, betas=(0.9, 1.0))


# --- advice ---


def caveats(advice):
    return "\n".join(advice.caveats)


def test_advice_on_a_batch_size():
    advice = advise(CONFIGURATION, target_batch_size=512)
    assert [move.solved_for for move in advice.moves] == ["learning_rate"]
    assert advice.noise_scale_before == pytest.approx(30.25)
    assert advice.noise_scale_unchanged == pytest.approx(0.953125)
    assert advice.noise_scale_after == pytest.approx(30.25)
    assert advice.exact == rescale(**PRESENT, target_batch_size=512)
    assert advice.linear == rescale(**PRESENT, target_batch_size=512, rule="linear")
    text = caveats(advice)
    for expected in [
        "N/10 = 100",
        "50% below",
        "about 5 epochs (Goyal",
        "divide the number of epochs by 1.98",
    ]:
        assert expected in text


def test_equations_hold_their_numbers():
    advice = advise(CONFIGURATION, target_batch_size=512)
    assert advice.equation == "g = lr (N/B - 1)/(1 - m) = 0.1 * (1000/32 - 1)/(1 - 0.9) = 30.25"
    assert advice.moves[0].why == (
        "exact: lr' = g (1 - m')/(N'/B' - 1) = 30.25 * (1 - 0.9)/(1000/512 - 1) = 3.17377",
        "linear: lr' = lr * B'/B = 0.1 * 512/32 = 1.6",
    )


@pytest.mark.parametrize(
    "target", [{"target_batch_size": 64}, {"target_momentum": 0.5}, {"target_learning_rate": 0.2}]
)
@pytest.mark.parametrize("dampening", [0.0, 0.25])
def test_equations_evaluate_to_the_advised_value(target, dampening):
    advice = advise(Configuration(**PRESENT, dampening=dampening), **target)
    for move in advice.moves:
        for line in (advice.equation, *move.why):
            _, numbers, value = line.rsplit(" = ", 2)
            # Six digits are shown.
            assert eval(numbers) == pytest.approx(float(value), rel=2e-5)


def test_small_change_far_from_n_needs_few_words():
    advice = advise(Configuration(0.1, 64, 10**6, 0.9), target_batch_size=32)
    text = caveats(advice)
    for absent in ["N/10", "linear rule", "Goyal", "weight_decay"]:
        assert absent not in text
    assert "hold the number of epochs" in text


@pytest.mark.parametrize("target", [{"target_momentum": 0.5}, {"target_dataset_size": 4000}])
def test_momentum_or_data_alone_reports_both_moves(target):
    advice = advise(CONFIGURATION, **target)
    assert [move.solved_for for move in advice.moves] == ["learning_rate", "batch_size"]
    assert advice.moves[0].exact.batch_size == 32
    assert advice.moves[1].exact.learning_rate == 0.1
    for move in advice.moves:
        assert move.exact.noise_scale == pytest.approx(30.25)
    assert "alternatives" in caveats(advice)


def test_dataset_size_says_what_becomes_of_weight_decay():
    assert "1000/4000 = 0.25" in caveats(advise(CONFIGURATION, target_dataset_size=4000))


def test_both_targets_say_what_restores():
    advice = advise(CONFIGURATION, target_batch_size=64, target_learning_rate=0.3)
    # 0.3 * (1000/64 - 1) / 0.1
    assert advice.noise_scale_unchanged == pytest.approx(43.875)
    assert "from 30.25 to 43.875" in caveats(advice)
    rate, batch = advice.moves
    assert (rate.exact.batch_size, batch.exact.learning_rate) == (64, 0.3)
    assert f"{rate.exact.learning_rate:.6g}" in caveats(advice)
    assert f"{batch.exact.batch_size:.6g}" in caveats(advice)


def test_full_batch_has_no_exact_solution():
    to_full = advise(CONFIGURATION, target_batch_size=1000)
    assert to_full.exact is None and to_full.noise_scale_after is None
    assert to_full.linear.learning_rate == pytest.approx(3.125)
    assert "whole training set" in caveats(to_full)
    from_full = advise(Configuration(0.1, 1000, 1000), target_batch_size=10)
    assert from_full.exact is None
    assert "full batch" in caveats(from_full)


def test_linear_outside_its_validity():
    advice = advise(CONFIGURATION, target_learning_rate=100.0)
    assert advice.linear is None
    assert advice.exact.batch_size < 1000
    assert "32000 examples" in caveats(advice)


def test_batches_below_one_example():
    advice = advise(CONFIGURATION, target_learning_rate=1e-4)
    assert advice.exact is None and advice.linear is None
    assert "at least one example" in caveats(advice)


def test_present_batch_larger_than_the_target_dataset():
    advice = advise(CONFIGURATION, target_dataset_size=30)
    assert advice.unchanged is None and advice.noise_scale_unchanged is None
    assert advice.moves[0].exact is None
    assert "does not fit" in caveats(advice)


def test_advice_refuses_bad_targets():
    with refuses("at least one of"):
        advise(CONFIGURATION)
    with refuses("`target_batch_size` to be at most"):
        advise(CONFIGURATION, target_batch_size=1001)
    with refuses("`learning_rate`"):
        advise(Configuration(0.0, 32, 1000), target_batch_size=64)


def test_adam_advice():
    present = AdamConfiguration(1e-3, 32, dataset_size=1000)
    advice = advise_adam(present, target_batch_size=64)
    assert advice.advised.learning_rate == pytest.approx(1e-3 * math.sqrt(2))
    assert advice.noise_scale_after == pytest.approx(advice.noise_scale_before)
    assert "Malladi" in caveats(advice)
    outside = advise_adam(present, target_batch_size=512)
    assert outside.advised is None
    assert "below a batch of 320" in caveats(outside)
    with refuses("`target_momentum`"):
        advise_adam(present, target_momentum=0.5)
    both = advise_adam(present, target_batch_size=64, target_learning_rate=2e-3)
    assert [move.solved_for for move in both.moves] == ["learning_rate", "batch_size"]
    assert both.moves[1].advised.batch_size == pytest.approx(128)
    data = advise_adam(present, target_dataset_size=4000)
    assert data.advised.learning_rate == 1e-3
    assert "does not enter" in caveats(data)


def test_adam_advice_near_the_whole_training_set():
    advice = advise_adam(AdamConfiguration(1e-3, 8, dataset_size=24), target_batch_size=24)
    assert advice.advised.learning_rate == pytest.approx(1e-3 * math.sqrt(3))
    for expected in [
        "present batch of 8 is above N/10 = 2.4",
        "advised batch of 24 is above N/10 = 2.4",
        "advised batch is the whole training set: its gradient has no sampling noise",
        "McCandlish",
    ]:
        assert expected in caveats(advice)
    far = advise_adam(AdamConfiguration(1e-3, 32, dataset_size=10**6), target_batch_size=16)
    unknown = advise_adam(AdamConfiguration(1e-3, 32), target_batch_size=16)
    for advice in (far, unknown):
        assert "N/10" not in caveats(advice) and "McCandlish" not in caveats(advice)


def test_adam_advice_on_a_batch_that_is_not_whole():
    # 8 * (1/2.7)^2 = 1.0974; sqrt(B'/B) is 1/2.7, and lr'/sqrt(1) = lr'.
    advice = advise_adam(AdamConfiguration(2.7e-3, 8), target_learning_rate=1e-3)
    assert (
        "A batch of 1.09739 has to be a whole number: with 1 lr/sqrt(B) is 0.001 in place of 0.000954594"
        in (caveats(advice))
    )
    whole = advise_adam(AdamConfiguration(2e-3, 8), target_learning_rate=1e-3)
    assert whole.advised.batch_size == 2
    assert "whole number" not in caveats(whole)


@given(st.integers(1, 100), st.integers(1, 100))
def test_adam_rule_with_decay_rescaled_shrinks_weights_alike(batch_size, target):
    # AdamW multiplies weights by 1 - lr * decay a step, and so by exp(-lr * decay * N/B) an epoch.
    present = AdamConfiguration(1e-3, batch_size, betas=(0.999,))
    (said,) = [
        float(caveat.split("sqrt(kappa) = ")[1].split(". ")[0])
        for caveat in advise_adam(present, target_batch_size=target).caveats
        if "Decoupled" in caveat
    ] or [1.0]
    advised = rescale_adam(
        learning_rate=1e-3, batch_size=batch_size, betas=(0.999,), target_batch_size=target
    )

    def shrinkage(configuration, decay):
        return configuration.learning_rate * decay * 1000 / configuration.batch_size

    assert shrinkage(advised, 0.01 * said) == pytest.approx(shrinkage(present, 0.01), rel=1e-5)


def test_adam_decay_is_said_for_each_move_and_not_without_change():
    both = advise_adam(AdamConfiguration(1e-3, 32), target_batch_size=64, target_learning_rate=2e-3)
    (rate,) = [said for said in both.caveats if said.startswith("With the new learning rate: Decoupled")]
    (batch,) = [said for said in both.caveats if said.startswith("With the new batch size: Decoupled")]
    assert "multiply weight_decay by sqrt(kappa) = 1.41421" in rate
    assert "multiply weight_decay by sqrt(kappa) = 2." in batch
    same = advise_adam(AdamConfiguration(1e-3, 32, dataset_size=1000), target_dataset_size=4000)
    assert "Decoupled" not in caveats(same)


@given(learning_rates, batch_sizes, batch_sizes)
def test_square_root_rule_is_the_learning_rate_part_of_adams(learning_rate, batch_size, target):
    arguments = {"learning_rate": learning_rate, "batch_size": batch_size, "dataset_size": 1000}
    plain = rescale(**arguments, target_batch_size=target, rule="sqrt")
    adam = rescale_adam(**arguments, betas=(), target_batch_size=target)
    assert (plain.learning_rate, plain.batch_size) == (adam.learning_rate, adam.batch_size)


@pytest.mark.parametrize("size", [29, 58, 116])
def test_adam_batch_target_is_met_exactly(size):
    # 29/7 * 7 is above 29 by a rounding, which must not push the batch over the data.
    present = AdamConfiguration(1e-3, 7, betas=(), dataset_size=size)
    assert advise_adam(present, target_batch_size=size).advised.batch_size == size
    assert rescale_adam(learning_rate=1e-3, batch_size=7, betas=(), dataset_size=size, target_batch_size=size)


def test_advice_at_a_batch_that_is_not_whole():
    # A solved batch can be advised on again: the inverse in the learning rate takes any real batch.
    present = Configuration(0.1, 32.5, 1000)
    assert advise(present, target_momentum=0.5).exact.learning_rate == pytest.approx(0.05)


def test_square_root_rule_stays_within_the_data():
    for far in (10.0, 1e300):
        with refuses("square-root rule asks for a batch", error=NoSolutionError):
            rescale(**PRESENT, target_learning_rate=far, rule="sqrt")

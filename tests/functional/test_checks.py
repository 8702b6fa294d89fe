"""What advice is held against: each check passes, fails and is left open where it should."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bayes.advice.table import advice_text
from lightning_bayes.functional import (
    AdamConfiguration,
    Check,
    Configuration,
    Move,
    advise,
    advise_adam,
    trainer_check,
)
from lightning_bayes.functional.advice.trainer_check import with_trainer_check
from tests.refusals import refuses

PRESENT = Configuration(0.1, 256, 50_000, 0.9)
ADAM = AdamConfiguration(1e-3, 256, dataset_size=50_000)


def check(advice, name):
    (found,) = [one for one in advice.checks if one.name == name]
    return found


def test_a_move_within_every_limit_is_safe():
    advice = advise(PRESENT, target_batch_size=2048, gradient_noise_scale=3000.0, largest_eigenvalue=0.2)
    assert advice.verdict == "safe"
    assert all(one.passed for one in advice.checks if not one.action)
    assert advice.summary == "batch 2048: lr 0.8299 (linear 0.8); safe, 6 checks pass"


def test_what_was_not_measured_is_left_open():
    advice = advise(PRESENT, target_batch_size=2048)
    assert advice.verdict == "unverified"
    open_checks = {one.name for one in advice.checks if one.passed is None}
    assert open_checks == {"gradient_noise_scale", "stability", "variance"}
    assert "3 of 6 unmeasured" in advice.summary


def test_batch_against_a_tenth_of_the_data():
    found = check(advise(PRESENT, target_batch_size=5000), "batch_size")
    assert (found.passed, found.value, found.limit) == (True, 5000, 5000)
    found = check(advise(PRESENT, target_batch_size=5001), "batch_size")
    assert found.passed is False
    assert advise(PRESENT, target_batch_size=5001).verdict == "doubtful"


def test_rules_that_differ_give_the_range():
    advice = advise(PRESENT, target_batch_size=8192)
    found = check(advice, "rules_agree")
    # 1 - linear/exact is (B' - B)/(N - B).
    assert found.value == pytest.approx(-(8192 - 256) / (50_000 - 256))
    assert found.passed is False and "3.2 to 3.807" in found.sentence
    assert advice.moves[0].range == pytest.approx((3.2, 3.80742), rel=1e-5)


def test_gradient_noise_scale():
    found = check(
        advise(PRESENT, target_batch_size=2048, gradient_noise_scale=1024.0), "gradient_noise_scale"
    )
    assert (found.passed, found.value, found.limit) == (False, 2048, 1024.0)
    # E ∝ 1 + B/B_simple: (1 + 2)/(1 + 1/4) = 2.4 times the examples.
    assert "2.4 times the examples" in found.sentence
    unresolved = check(
        advise(PRESENT, target_batch_size=2048, gradient_noise_scale=math.nan), "gradient_noise_scale"
    )
    assert unresolved.passed is None and "not resolved" in unresolved.sentence
    # A batch that does not grow cannot save steps.
    assert "gradient_noise_scale" not in {one.name for one in advise(PRESENT, target_batch_size=128).checks}


@pytest.mark.parametrize(
    ("arguments", "edge"),
    [({}, 2 * 1.9), ({"dampening": 0.5}, 2 * 1.9 / 0.5), ({"nesterov": True}, 2 * 1.9 / 2.8)],
)
def test_stability_is_that_of_the_recursion(arguments, edge):
    present = Configuration(0.1, 256, 50_000, 0.9, **arguments)
    rate = advise(present, target_batch_size=512).exact.learning_rate
    for share, stable in [(0.99, True), (1.01, False)]:
        h = share * edge / rate
        advice = advise(present, target_batch_size=512, largest_eigenvalue=h)
        found = check(advice, "stability")
        assert found.passed is stable
        assert found.limit == pytest.approx(edge / h)
        assert diverges(rate, h, present) is not stable


def diverges(learning_rate, h, configuration):
    """SGD of torch on a quadratic of curvature h, stepped literally."""
    x, buffer = 1.0, None
    for _ in range(5000):
        gradient = h * x
        damped = (1 - configuration.dampening) * gradient
        buffer = gradient if buffer is None else configuration.momentum * buffer + damped
        x -= learning_rate * (
            gradient + configuration.momentum * buffer if configuration.nesterov else buffer
        )
        if abs(x) > 1e3:
            return True
    return abs(x) > 1


def test_a_large_batch_is_written_out():
    # 50000/(1 + 194.313 * 0.1/10.3)
    assert advise(PRESENT, target_learning_rate=10.3).summary.startswith(
        "up to lr 2.053: batch 4778 (rules agree limits it); asked, lr 10.3: batch 17322 (linear 26368);"
    )


@pytest.mark.parametrize("momentum", [0.5, 0.6, 0.9, 0.999])
def test_nesterov_momentum_damps_the_noise(momentum):
    """Which leaves the noise scale as little of the story as too much of it does."""
    present = Configuration(0.1, 256, 50_000, momentum, nesterov=True)
    left_open = check(advise(present, target_batch_size=512), "variance")
    most = float(re.search(r"stays below (\S+)\.$", left_open.sentence)[1])
    below, above = (
        check(advise(present, target_batch_size=512, largest_eigenvalue=share * most), "variance")
        for share in (0.999, 1.001)
    )
    assert below.passed is True and above.passed is False
    side = 1.1 if above.value > 1 else 1 / 1.1
    assert above.value == pytest.approx(side, rel=1e-2)
    assert ("Nesterov's momentum damps" in above.sentence) == (side < 1)


@pytest.mark.parametrize("momentum", [5e-324, 1e-300, 1e-17, 1e-9])
def test_a_nesterov_momentum_of_next_to_nothing_is_none(momentum):
    """Whose noise is 1.1 times as large at r = 1 - 1/1.1."""
    advice = advise(Configuration(1.0, 1, 1000, momentum, nesterov=True), target_batch_size=2)
    most = float(re.search(r"stays below (\S+)\.$", check(advice, "variance").sentence)[1])
    assert most == pytest.approx(2 * (1 - 1 / 1.1) / advice.exact.learning_rate, rel=1e-3)


def test_variance_beyond_that_of_the_noise_scale():
    rate = advise(PRESENT, target_batch_size=512).exact.learning_rate
    for ratio, passed in [(0.09, True), (0.1, False)]:
        advice = advise(PRESENT, target_batch_size=512, largest_eigenvalue=ratio * 3.8 / rate)
        found = check(advice, "variance")
        assert found.value == pytest.approx(1 / (1 - ratio))
        assert found.passed is passed
    beyond = check(advise(PRESENT, target_batch_size=512, largest_eigenvalue=1e3), "variance")
    assert beyond.value == math.inf and beyond.passed is False
    flat = check(advise(PRESENT, target_batch_size=512, largest_eigenvalue=-1.0), "stability")
    assert flat.passed and flat.limit == math.inf


def test_what_is_to_be_done_with_a_move():
    advice = advise(PRESENT, target_batch_size=2048, ema_decay=0.999)
    actions = {one.name: one for one in advice.checks if one.action}
    assert actions["warm_up"].value == pytest.approx(advice.exact.learning_rate / 0.1)
    # As many steps as leave learning rate x steps where it was, of epochs that are fewer by the same token.
    assert actions["steps"].value == pytest.approx(0.1 / advice.exact.learning_rate)
    assert actions["steps"].value * actions["epochs"].value == pytest.approx(1 / 8)
    assert (actions["weight_ema"].value, actions["weight_ema"].limit) == (0.999, pytest.approx(0.999**8))
    assert {one.status for one in actions.values()} == {"do"}
    # None of them is a reason to doubt.
    assert advice.verdict == "unverified"


def test_nothing_to_do_where_nothing_grows():
    advice = advise(PRESENT, target_batch_size=256)
    assert all(one.passed for one in advice.checks)
    assert advice.verdict == "safe" and advice.caveats == ()


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1000, 4000), st.floats(0.9, 0.9999))
def test_weight_average_spans_the_same_part_of_an_epoch(batch, target, data, rho):
    present = Configuration(0.1, batch, 1000)
    advice = advise(present, target_batch_size=target, target_dataset_size=data, ema_decay=rho)
    found = check(advice, "weight_ema")
    # Steps that the average spans, 1/(1 - rho) and so -1/ln(rho), over those of an epoch.
    if not found.passed:
        span = -1 / math.log(found.limit) / (data / target)
        assert span == pytest.approx(-1 / math.log(rho) / (1000 / batch), rel=1e-6)


def test_adams_rule_and_its_domain():
    advice = advise_adam(ADAM, target_batch_size=2048)
    found = check(advice, "adam_domain")
    assert found.value == pytest.approx(8 * 0.1) and found.passed
    outside = advise_adam(ADAM, target_batch_size=2561)
    assert outside.verdict == "impossible" and outside.advised is None
    assert "no learning rate keeps the noise" in outside.summary
    assert outside.moves[0].linear.learning_rate == pytest.approx(1e-3 * 2561 / 256)


@pytest.mark.parametrize(("noise", "passed"), [(None, None), (4000.0, True), (1000.0, False)])
def test_adams_square_root_against_the_linear_rule(noise, passed):
    advice = advise_adam(ADAM, target_batch_size=2048, gradient_noise_scale=noise)
    found = check(advice, "rules_agree")
    assert found.passed is passed
    assert "0.002828 to 0.008" in found.sentence
    assert advice.moves[0].range == pytest.approx((1e-3 * math.sqrt(8), 8e-3))


@pytest.mark.parametrize(
    ("layout", "value", "expected"),
    [
        ({"loader_batch_size": 256}, 8, "accumulate_grad_batches=8 with the DataLoader's batch_size=256"),
        ({"loader_batch_size": 256}, 8, "devices=8 with batch_size=256"),
        ({"loader_batch_size": 256, "replicas": 8}, 1, "stays as it is"),
        ({"loader_batch_size": 128, "replicas": 4}, 4, "on each of the 4 devices"),
        ({"loader_batch_size": 100}, 1, "DataLoader(batch_size=2048)"),
        ({"replicas": 8}, 1, "DataLoader(batch_size=256) on each of the 8 devices"),
    ],
)
def test_the_trainer_can(layout, value, expected):
    found = trainer_check(2048, **layout)
    assert found.action and found.value == value and expected in found.sentence


def test_the_trainer_cannot():
    found = trainer_check(2047, replicas=8)
    assert found.passed is False and not found.action
    assert "take 2040 or 2048" in found.sentence
    with refuses("`replicas`"):
        trainer_check(64, replicas=0)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"gradient_noise_scale": 0.0}, "gradient_noise_scale"),
        ({"gradient_noise_scale": "1"}, "gradient_noise_scale"),
        ({"largest_eigenvalue": math.nan}, "largest_eigenvalue"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_bad_measurements_are_named(arguments, name):
    with refuses(f"`{name}`"):
        advise(PRESENT, target_batch_size=512, **arguments)


@pytest.mark.parametrize(
    ("passed", "action", "expected"),
    [
        ((True, True), (False, False), "safe"),
        ((True, None), (False, False), "unverified"),
        ((None, False), (False, False), "doubtful"),
        ((True, False), (False, True), "safe"),
    ],
)
def test_verdict_is_the_worst_check(passed, action, expected):
    checks = [Check("x", one, None, None, "", other) for one, other in zip(passed, action, strict=True)]
    assert Move("batch_size", PRESENT, PRESENT, (), tuple(checks)).verdict == expected


@pytest.mark.parametrize(
    ("advice", "status"),
    [
        (advise(PRESENT, target_batch_size=8192), "FAILS"),
        (advise(PRESENT, target_batch_size=512, largest_eigenvalue=1e3), "FAILS"),
        (advise(PRESENT, target_batch_size=512), "not measured"),
        (advise_adam(ADAM, target_batch_size=2561), "FAILS"),
    ],
)
def test_a_check_that_does_not_pass_is_in_the_table(advice, status):
    text = advice_text([advice])
    words = " ".join(text.split())
    for one in advice.checks:
        if not one.passed:
            assert " ".join(one.sentence.split()) in words
    assert status in text
    assert words.startswith(f"Scaling advice {advice.summary}".replace("; asked", " asked"))
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({}, 5000),  # N/10
        ({"gradient_noise_scale": 3000.0}, 3000),
        ({"largest_eigenvalue": 0.4}, None),
    ],
)
def test_a_move_too_far_says_how_far_it_may_go(measured, expected):
    advice = advise(PRESENT, target_batch_size=8192, **measured)
    (note,) = [note for note in advice.notes if note.startswith("Up to a batch of")]
    reached = int(note.split("batch of ")[1].split(",")[0])
    if expected is not None:
        assert reached == expected
    for batch, fails in [(reached, False), (reached + 1, True)]:
        checks = advise(PRESENT, target_batch_size=batch, **measured).checks
        assert any(one.passed is False and not one.action for one in checks) is fails


def test_how_far_adam_may_go():
    present = AdamConfiguration(1e-3, 256, (0.75, 0.999))  # kappa * 0.25 < 1
    assert "Up to a batch of 1023," in advise_adam(present, target_batch_size=4096).notes[0]
    # Where the present run already fails, nothing above it passes.
    far = advise(Configuration(0.1, 6000, 50_000), target_batch_size=8000)
    assert not any(note.startswith("Up to") for note in far.notes)


def test_two_moves_have_their_own_checks():
    advice = advise(PRESENT, target_momentum=0.5)
    assert advice.summary == (
        "momentum 0.5: lr 0.5, or batch 51.41 (linear 51.2); unverified, 2 of 5 unmeasured"
    )
    both = advise(PRESENT, target_batch_size=512, target_learning_rate=0.3)
    assert both.summary.startswith(
        "batch 512, lr 0.3: instead lr 0.201 (linear 0.2), or batch 760.2 (linear 768); "
    )
    assert advise(PRESENT, target_dataset_size=100_000).summary.startswith(
        "N 100000: lr 0.04987 (linear 0.05); safe"
    )
    text = advice_text([advice])
    assert "How sure, new learning rate" in text and "With the move, new batch size" in text
    assert any(caveat.startswith("With the new batch size: A batch of 51.41") for caveat in advice.caveats)


def test_a_curvature_says_nothing_of_adam():
    with pytest.raises(ValueError, match="`largest_eigenvalue` to be None for an Adam-like"):
        advise(ADAM, target_batch_size=512, largest_eigenvalue=0.1)


def test_a_batch_that_divides_keeps_the_new_data_of_adam():
    """The size of the present training set is not known."""
    advice = with_trainer_check(
        advise(AdamConfiguration(1e-3, 1), target_batch_size=16, target_dataset_size=200), replicas=8
    )
    assert (advice.safe.batch_size, advice.safe.dataset_size) == (8, 200)
    assert advice.summary.startswith("up to batch 8, N 200: lr 0.002828")

"""What a reader is told first: the largest move that no check fails, and no ratio to nothing."""

import itertools
import re

import pytest

from lightning_bayes.advice.table import advice_text
from lightning_bayes.functional import AdamConfiguration, Configuration, advise, advise_adam, compare
from lightning_bayes.functional.advice.trainer_check import with_trainer_check

PRESENT = Configuration(0.1, 256, 50_000, 0.9)
ADAM = AdamConfiguration(1e-3, 256, (0.9, 0.999), dataset_size=50_000)
TARGETS = [
    {"target_batch_size": 20_000},
    {"target_learning_rate": 10.0},
    {"target_momentum": 0.9995},
    {"target_dataset_size": 2000},
    {"target_batch_size": 9000, "target_dataset_size": 60_000},
]


def fails(checks):
    return [check.name for check in checks if check.passed is False and not check.action]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("measured", [{}, {"largest_eigenvalue": 0.3}])
def test_no_check_fails_the_safe_move_and_one_fails_just_beyond(targets, measured):
    advice = advise(PRESENT, **targets, **measured)
    for index, move in enumerate(advice.moves):
        if not fails(move.checks):
            assert move.safe == move.exact and move.limited_by == ()
            continue
        assert move.safe is not None and move.limited_by
        # As a target of its own it passes.
        asked = {}
        for name in targets:
            field = name.removeprefix("target_")
            asked[name] = getattr(move.safe, field)
        alone = advise(PRESENT, **asked, **measured).moves[index]
        assert fails(alone.checks) == []
        for name, value in asked.items():
            here = getattr(PRESENT, name.removeprefix("target_"))
            step = 1 if isinstance(value, int) else 1e-3 * value
            asked[name] = value + step if value >= here else value - step
            if name == "target_momentum":
                asked[name] = 1 - (1 - value) * 0.999
        assert set(move.limited_by) & set(fails(advise(PRESENT, **asked, **measured).moves[index].checks))


def test_the_headline_begins_with_what_no_check_fails():
    """Twenty times the learning rate, where a check expects divergence."""
    present = Configuration(0.05, 8, 640)
    advice = advise(present, target_batch_size=128, largest_eigenvalue=3.0)
    assert advice.exact.learning_rate == pytest.approx(0.9875)
    first = float(
        re.match(r"up to batch (\d+): lr (\S+) \((\w+) limits it\); asked, batch 128", advice.summary)[2]
    )
    assert first == pytest.approx(advice.safe.learning_rate, rel=1e-3)
    assert advice.safe.learning_rate * 3.0 < 2
    assert advice.summary.index("asked") < advice.summary.index("0.9875")


def test_adam_and_where_nothing_is_safe():
    far = advise_adam(ADAM, target_batch_size=4096)
    assert far.safe.batch_size == 2559 and "up to batch 2559: lr 0.003162 (solution limits it)" in far.summary
    none = advise(Configuration(0.1, 6000, 50_000), target_batch_size=8000)
    assert none.safe is None and none.summary.startswith(
        "no move to a new learning rate passes (present batch"
    )
    safe = advise(PRESENT, target_batch_size=512, gradient_noise_scale=1e3, largest_eigenvalue=0.01)
    assert safe.safe == safe.exact and safe.summary.startswith("batch 512: lr 0.201")


def test_a_safe_batch_divides_among_the_devices():
    advice = with_trainer_check(advise(PRESENT, target_batch_size=9000), replicas=48)
    assert advice.safe.batch_size == 4992 and advice.safe.noise_scale == pytest.approx(PRESENT.noise_scale)
    odd = with_trainer_check(advise(PRESENT, target_batch_size=500), replicas=8)
    assert odd.moves[0].limited_by == ("trainer",) and odd.safe.batch_size == 496
    assert odd.summary.startswith("up to batch 496: lr 0.1947 (trainer limits it)")


ODD = [
    advise(PRESENT, target_batch_size=512, largest_eigenvalue=1e6),
    advise(PRESENT, target_batch_size=512, largest_eigenvalue=0.0),
    advise(PRESENT, target_batch_size=512, largest_eigenvalue=-0.0),
    advise(PRESENT, target_batch_size=512, largest_eigenvalue=-3.0),
    advise(Configuration(0.1, 256, 50_000, 0.5, nesterov=True), target_batch_size=512),
    advise(Configuration(0.1, 100, 100), target_batch_size=50),
    advise(Configuration(0.1, 100, 200), target_batch_size=200, target_learning_rate=0.2),
    advise(Configuration(0.1, 1, 200), target_batch_size=200),
    advise_adam(ADAM, target_batch_size=512, gradient_noise_scale=float("nan")),
    advise_adam(AdamConfiguration(1e-3, 8, ()), target_batch_size=512),
]
FULL, SOME = Configuration(0.1, 100, 100), Configuration(0.1, 10, 100)
PAIRS = [
    (SOME, FULL),
    (FULL, SOME),
    (FULL, FULL),
    (SOME, 0.0),
    (Configuration(0.0, 10, 100), SOME),
    (SOME, Configuration(0.0, 10, 100)),
    (AdamConfiguration(0.0, 8), AdamConfiguration(1e-3, 8)),
    (AdamConfiguration(1e-3, 8), AdamConfiguration(0.0, 8)),
]


def test_no_ratio_to_nothing_is_printed():
    comparisons = list(itertools.starmap(compare, PAIRS))
    sentences = [check.sentence for advice in ODD for check in advice.checks]
    text = " ".join([advice_text(ODD, comparisons), *sentences, *(one.summary for one in comparisons)])
    words = " ".join(text.split())
    assert not re.findall(r"(?<![\w.-])(?:-?inf|nan|-0|0 times)(?![\w.])", words)
    assert comparisons[0].summary.count("of which one has no noise") == 1
    assert "the same within 1%" in comparisons[2].summary


@pytest.mark.parametrize("noise", [100.0, 1000.0])
def test_adam_says_which_question_its_range_answers(noise):
    advice = advise_adam(
        AdamConfiguration(1e-3, 64, (0.99, 0.999)), target_batch_size=256, gradient_noise_scale=noise
    )
    (check,) = [one for one in advice.checks if one.name == "rules_agree"]
    beyond = noise < 256
    assert (check.passed is False) == beyond
    assert ("Li et al. 2024" in check.sentence) == beyond and "trajectory" in check.sentence

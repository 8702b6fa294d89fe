"""A loss that sums the examples of a training_step: the same run as one with a mean, in another unit."""

import json
from dataclasses import replace

import pytest
import torch

from lightning_bayes.functional import (
    AdamConfiguration,
    Configuration,
    SavedAdvice,
    advise,
    advise_adam,
    compare,
)
from lightning_bayes.functional.advice.trainer_check import with_trainer_check
from lightning_bayes.functional.configuration import Targets
from lightning_bayes.functional.scaling import solve
from tests.refusals import refuses

MEAN = Configuration(0.05, 32, 1000, 0.5, nesterov=True)
TARGETS = [
    {"target_batch_size": 64},
    {"target_batch_size": 16, "target_momentum": 0.8},
    {"target_dataset_size": 1500},
    {"target_batch_size": 900},  # beyond what the checks allow
]


def summed(configuration, batches=1):
    rate = configuration.learning_rate * batches / configuration.batch_size
    return replace(configuration, learning_rate=rate, reduction="sum", averaged_batches=batches)


@pytest.mark.parametrize("batches", [1, 2, 8])
def test_a_step_is_that_of_the_mean_loss(batches):
    """By plain autograd in float64: k batches, each summed and the k sums averaged, as accumulation and DDP do."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def gradient(loss):
        return torch.autograd.grad(loss, weights)[0]

    of_mean = gradient(((x @ weights - y) ** 2).mean())
    parts = zip(x.chunk(batches), y.chunk(batches), strict=True)
    of_sums = sum(gradient(((a @ weights - b) ** 2).sum()) for a, b in parts) / batches
    configuration = summed(MEAN, batches)
    torch.testing.assert_close(configuration.learning_rate * of_sums, MEAN.learning_rate * of_mean)
    assert configuration.mean_learning_rate == pytest.approx(MEAN.learning_rate)
    assert configuration.noise_scale == pytest.approx(MEAN.noise_scale)
    assert configuration.time_per_epoch == pytest.approx(MEAN.time_per_epoch)


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("targets", TARGETS)
def test_the_same_moves_in_another_unit(targets, batches):
    measured = {"gradient_noise_scale": 300.0, "largest_eigenvalue": 1.0}
    (of_mean, *_), (of_sum, *_) = (
        advise(one, **targets, **measured).moves for one in (MEAN, summed(MEAN, batches))
    )
    assert of_mean.verdict == of_sum.verdict and of_mean.limited_by == of_sum.limited_by
    for name in ("exact", "linear", "safe"):
        expected = getattr(of_mean, name)
        assert expected is not None, name
        found = getattr(of_sum, name)
        assert found == replace(summed(expected, batches), learning_rate=found.learning_rate)
        assert found.learning_rate == pytest.approx(summed(expected, batches).learning_rate)
    actions = ("weight_decay", "warm_up")
    for one, other in zip(
        [check for check in of_mean.checks if check.name not in actions],
        [check for check in of_sum.checks if check.name not in actions],
        strict=True,
    ):
        assert (one.name, one.passed) == (other.name, other.passed)
        if one.name == "stability":  # of the learning rate that the user sets
            assert other.value / other.limit == pytest.approx(one.value / one.limit)
        elif one.value is not None:
            assert other.value == pytest.approx(one.value)


def test_a_batch_for_a_learning_rate_of_the_sum():
    present = summed(MEAN, 2)
    # The unit changes with the batch: solved by trying every batch.
    target = present.learning_rate * 1.02
    (move,) = advise(present, target_learning_rate=target).moves
    tried = [replace(present, learning_rate=target, batch_size=b) for b in range(1, 1001)]
    nearest = min(tried, key=lambda one: abs(one.noise_scale - present.noise_scale))
    assert move.exact.batch_size == pytest.approx(nearest.batch_size, abs=0.51)
    assert move.exact.noise_scale == pytest.approx(present.noise_scale)
    assert move.linear is None and "chooses no batch size for a summed loss" in " ".join(
        check.sentence for check in move.checks
    )
    # Half of it on the sum is half of it at every batch: none has as much noise.
    (none,) = advise(present, target_learning_rate=present.learning_rate / 2).moves
    assert (none.verdict == "impossible" and none.safe is None) or none.safe.batch_size >= 1


def test_square_root_rule_of_the_sum():
    present = summed(Configuration(0.05, 32, 1000))
    moved = solve(present, Targets(batch_size=128), "learning_rate", "sqrt")
    assert moved.mean_learning_rate == pytest.approx(0.1)
    back = solve(moved, Targets(learning_rate=present.learning_rate), "batch_size", "sqrt")
    assert back.batch_size == pytest.approx(32)


def test_weight_decay_is_a_prior_of_the_summed_loss():
    """λ = N · weight_decay / b: from b = 16 to 64 the decay is four times as large, beside N -> 2N twice."""
    present = summed(Configuration(0.05, 32, 1000), 2)
    only = advise(present, target_batch_size=128)
    both = advise(present, target_batch_size=128, target_dataset_size=2000)
    values = [[c.value for c in one.checks if c.name == "weight_decay"] for one in (only, both)]
    assert values == [[pytest.approx(4)], [pytest.approx(2)]]
    assert not [c for c in advise(MEAN, target_batch_size=64).checks if c.name == "weight_decay"]


def test_adam_moves_eps_alone_with_the_sum():
    """The step (b G)/(b √v + eps) is that of the mean with eps/b."""
    of_mean = AdamConfiguration(1e-3, 32, (0.95, 0.999), 1e-8 / 32, 10_000)
    of_sum = AdamConfiguration(1e-3, 32, (0.95, 0.999), 1e-8, 10_000, reduction="sum")
    one, other = (advise_adam(found, target_batch_size=64).advised for found in (of_mean, of_sum))
    assert other.eps == pytest.approx(64 * one.eps)
    assert (other.learning_rate, other.betas) == (one.learning_rate, one.betas)
    # A known-good mean run carried to the present sum, and the other way round.
    expected = compare(replace(of_sum, batch_size=64, learning_rate=one.learning_rate), of_mean).expected
    assert expected.eps == pytest.approx(64 * one.eps) and expected.reduction == "sum"


@pytest.mark.parametrize("batches", [1, 4])
def test_comparisons_restore_the_noise_of_either_unit(batches):
    present, good = summed(Configuration(0.2, 32, 1000, 0.5), batches), Configuration(0.2, 40, 1000, 0.5)
    assert not compare(summed(good, batches), good).differs and not compare(good, summed(good)).differs
    comparison = compare(present, good)
    assert comparison.differs
    names = [change.quantity for change in comparison.restorations]
    assert {"learning_rate", "momentum", "dataset_size"} <= set(names)
    for change in comparison.restorations:
        value = change.value if change.quantity in ("learning_rate", "momentum", "batch_size") else None
        if value is not None:
            restored = replace(present, **{change.quantity: value})
            assert restored.noise_scale == pytest.approx(good.noise_scale)


def test_json_keeps_the_reduction_and_old_files_are_of_means():
    saved = SavedAdvice(
        {"SGD": summed(MEAN, 2)},
        (advise(summed(MEAN, 2), target_batch_size=900),),
        (compare(summed(MEAN), MEAN),),
    )
    assert SavedAdvice.from_json(saved.to_json()) == saved
    document = json.loads(SavedAdvice({"SGD": MEAN}, (advise(MEAN, target_batch_size=900),)).to_json())

    def strip(value):
        if isinstance(value, dict):
            new = ("reduction", "averaged_batches", "safe", "limited_by")
            return {key: strip(item) for key, item in value.items() if key not in new}
        return [strip(item) for item in value] if isinstance(value, list) else value

    old = SavedAdvice.from_json(json.dumps(strip(document)))
    assert old.configurations == {"SGD": MEAN} and old.advice[0].present == MEAN


def test_the_trainer_keeps_what_the_learning_rate_is_for():
    present = summed(MEAN, 2)

    def said(target, **layout):
        advice = with_trainer_check(advise(present, target_batch_size=target), **layout)
        (check,) = [one for one in advice.checks if one.name == "trainer"]
        return advice.exact, check.sentence

    _, sentence = said(64, loader_batch_size=16, accumulate_grad_batches=2)
    assert "DataLoader(batch_size=32) and accumulate_grad_batches=2" in sentence
    exact, sentence = said(60, loader_batch_size=16, accumulate_grad_batches=2, replicas=4)
    # Four devices average four sums of 15 in place of two of 30: twice the learning rate.
    assert "DataLoader(batch_size=15) on each of the 4 devices" in sentence
    assert f"{2 * exact.learning_rate:.6g}." in sentence


def test_words_name_the_unit():
    advice = advise(summed(MEAN, 2), target_batch_size=64)
    assert any("sum over the examples of a training_step (B/2 examples" in note for note in advice.notes)
    assert "g = lr b (N/B - 1)/(1 - m) = 0.003125 * 16 *" in advice.equation
    assert not any("sum over" in note for note in advise(MEAN, target_batch_size=64).notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"reduction": "none"}, "`reduction`"), ({"averaged_batches": 0}, "`averaged_batches`")],
)
def test_bad_arguments(arguments, message):
    with refuses(message):
        Configuration(0.1, 8, 100, **arguments)


def test_a_present_batch_that_no_longer_fits_is_no_solution():
    present = Configuration(0.1, 20, 20, reduction="sum", averaged_batches=2)
    advice = advise(present, target_momentum=0.5, target_dataset_size=10)
    assert {move.verdict for move in advice.moves} <= {"impossible", "doubtful"}

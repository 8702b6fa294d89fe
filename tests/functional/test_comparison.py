import math

import pytest

from lightning_bayes.functional import AdamConfiguration, Configuration, compare
from tests.refusals import refuses

PRESENT = Configuration(0.1, 64, 1000, 0.9)  # g = 0.1 * 14.625 / 0.1 = 14.625


def changes(comparison):
    return {change.quantity: change.value for change in comparison.restorations}


def test_changes_by_hand():
    comparison = compare(PRESENT, Configuration(0.1, 32, 1000, 0.9))  # g = 30.25
    assert comparison.differs and comparison.ratio == pytest.approx(14.625 / 30.25)
    found = changes(comparison)
    assert found["learning_rate"] == pytest.approx(0.1 * 30.25 / 14.625)
    assert found["batch_size"] == pytest.approx(32)
    assert found["momentum"] == pytest.approx(1 - 0.1 * 14.625 / 30.25)
    assert found["dataset_size"] == pytest.approx(64 * (1 + 30.25))
    assert "batch size 32" in comparison.summary and "0.4835 times" in comparison.summary


def test_one_per_cent_is_the_limit():
    for factor, differs in [(1.009, False), (1.011, True), (0.991, False), (0.989, True)]:
        assert compare(Configuration(0.1 * factor, 64, 1000, 0.9), PRESENT).differs is differs
    assert "the same within 1%" in compare(PRESENT, PRESENT).summary


def test_a_noise_scale_alone_is_enough():
    comparison = compare(PRESENT, 30.25, name="SGD", source="run")
    assert comparison.reference is None
    assert changes(comparison)["batch_size"] == pytest.approx(32)
    assert "14.625 of SGD, and 30.25 in the reference (run)" in comparison.summary


def test_changes_that_do_not_solve_are_left_out():
    # Less noise than without momentum, and more than a batch of one example has.
    assert "momentum" not in changes(compare(PRESENT, 0.5))
    assert "batch_size" not in changes(compare(PRESENT, 1e6))
    assert changes(compare(Configuration(0.0, 64, 1000), PRESENT)).keys() == {"learning_rate"}


def test_without_any_noise():
    full = Configuration(0.1, 1000, 1000)
    assert compare(full, full).ratio == 1
    assert compare(PRESENT, full).ratio == math.inf
    assert changes(compare(PRESENT, full)) == {"batch_size": 1000}
    assert "learning_rate" not in changes(compare(full, PRESENT))


def test_adam():
    reference = AdamConfiguration(1e-3, 64)
    same = AdamConfiguration(2e-3, 256, (1 - 0.4, 1 - 0.004), 5e-9)
    assert not compare(same, reference).differs
    # The learning rate alone follows the rule: the betas do not.
    alone = compare(AdamConfiguration(2e-3, 256), reference)
    assert alone.differs and alone.betas_differ and alone.ratio == pytest.approx(1)
    assert "betas become (0.6, 0.996)" in alone.summary and "restores" not in alone.summary
    off = compare(AdamConfiguration(4e-3, 256), reference)
    assert changes(off) == {"learning_rate": pytest.approx(2e-3), "batch_size": pytest.approx(1024)}
    assert not compare(AdamConfiguration(1e-3, 64), 1e-3 / 8).differs


def test_different_kinds_are_refused():
    with refuses("`reference` to be a Configuration"):
        compare(PRESENT, AdamConfiguration(1e-3, 64))
    with refuses("`reference`"):
        compare(PRESENT, -1.0)

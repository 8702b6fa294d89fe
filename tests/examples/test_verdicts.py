"""Verdicts on numbers that were made up: each claim can hold, fail and stay open."""

from dataclasses import replace

import numpy as np
import pytest

from examples.smith_le_2018.best_batch import Sweep, slope_claim
from examples.smith_le_2018.collapse import _claims as collapse_claims
from examples.smith_le_2018.collapse import _Cloud
from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.figure_3 import _shrinking_claims
from examples.smith_le_2018.goyal import _claims as goyal_claims
from examples.smith_le_2018.goyal import _Line
from tests.examples.digits import TINY

GRID = (8, 12, 16, 24, 32, 48, 64)
X = (1.0, 2.0, 4.0)


def sweep(exponent, noise=0.0, seeds=5):
    generator = np.random.default_rng(0)
    grids = []
    for value in X:
        sizes = [round(100 * size * value**exponent) for size in GRID]
        octaves = np.log2(sizes) - np.log2(2200 * value**exponent)
        grids.append((sizes, 0.9 - 0.01 * octaves**2 + noise * generator.normal(size=(seeds, len(sizes)))))
    return Sweep(X, grids, [f"x = {value:g}" for value in X])


@pytest.mark.parametrize(
    ("exponent", "noise", "verdict"),
    [(1.0, 0.0005, "holds"), (0.5, 0.0005, "does not hold"), (1.0, 0.02, "not resolved")],
)
def test_slope(exponent, noise, verdict):
    assert slope_claim("fig5", "a claim", "x", sweep(exponent, noise)).verdict == verdict


def test_slope_of_a_peak_at_the_edge_is_not_resolved():
    made = sweep(1.0)
    cut = replace(made, grids=[(sizes[:4], found[:, :4]) for sizes, found in made.grids[:1]] + made.grids[1:])
    verdict = slope_claim("fig5", "a claim", "x", cut).verdict
    assert verdict == "not resolved: the best batch is at the edge of the grid for x = 1"


@pytest.mark.parametrize(
    ("with_l2", "verdict"), [(0.005, "holds"), (0.04, "does not hold"), (-0.2, "does not hold")]
)
def test_a_gap_that_turns_round_has_not_shrunk(with_l2, verdict):
    """A small batch that L2 keeps from training is no smaller a gap."""
    seeds = 0.001 * np.arange(-2, 3)
    (claim,) = _shrinking_claims(TINY, np.array([0.02 + seeds, with_l2 - seeds]))
    assert claim.verdict == verdict


def clouds(accuracy):
    """Settings of one N, [seeds, runs], with accuracies a function of the run."""
    made = [
        [Run(1000, size, rate, 0.9, 0.0, 100, 0) for size in (2, 4, 8, 16, 32, 64)]
        for rate in (0.1, 0.4, 1.6)
    ]
    return [
        _Cloud(str(number), runs, np.tile([accuracy(run) for run in runs], (3, 1)))
        for number, runs in enumerate(made)
    ]


def test_collapse_tells_g_from_b():
    more, alone = collapse_claims(clouds(lambda run: -np.floor(np.log2(run.noise_scale))))
    assert more.verdict == alone.verdict == "holds" and alone.estimate == pytest.approx(1.0)
    more, alone = collapse_claims(clouds(lambda run: -run.batch_size))
    assert more.verdict == alone.verdict == "does not hold"


def test_more_than_b_is_not_g_alone():
    """Accuracy that follows g as well as ε."""
    more, alone = collapse_claims(clouds(lambda run: np.log2(run.noise_scale) + np.log2(run.learning_rate)))
    assert more.verdict == "holds" and alone.verdict == "does not hold"


def test_goyals_rule_is_judged_where_it_does_worst_as_well():
    rates, noise = np.array([0.1, 0.2, 0.4]), 1e-4 * np.arange(3)[:, None]
    kept = _Line("240", rates, 0.91 + noise * np.ones(3))
    lost = _Line("80", rates, 0.88 - 0.1 * np.log10(rates) + noise * np.arange(3))
    best, worst = goyal_claims([kept, lost], kept)
    assert best.verdict == "holds" and worst.verdict == "does not hold"
    assert worst.estimate == pytest.approx(-0.1, abs=0.01) and "it holds at 240, of 2" in worst.quantity

"""What the example's README says beyond verdicts, held to the committed results of the paper preset."""

import csv
from collections import defaultdict

import numpy as np
import pytest

from examples.smith_le_2018.cli import RESULTS
from examples.smith_le_2018.collapse import explained
from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.presets import PRESETS

PAPER = PRESETS["paper"]


@pytest.fixture(scope="module")
def accuracies():
    """Run without L2, its seed left out -> mean test accuracy after the preset's training time."""
    found = defaultdict(list)
    with (RESULTS / "paper" / "runs.csv").open() as file:
        for row in csv.DictReader(file):
            n, size, step = (int(row[name]) for name in ("num_examples", "batch_size", "step"))
            rate, momentum = float(row["learning_rate"]), float(row["momentum"])
            if float(row["weight_decay"]) == 0.0 and step == round(PAPER.training_time / rate):
                found[Run(n, size, rate, momentum, 0.0, step, 0)].append(float(row["test_accuracy"]))
    assert all(len(values) == PAPER.seeds for values in found.values())
    return {run: np.mean(values) for run, values in found.items()}


def curves(accuracies):
    """N -> batch sizes of figure 6, ascending, and their accuracies."""
    found = defaultdict(list)
    for run, value in accuracies.items():
        if (run.learning_rate, run.momentum) == (PAPER.learning_rate, PAPER.momentum):
            found[run.num_examples].append((run.batch_size, value))
    return {n: tuple(map(np.array, zip(*sorted(pairs), strict=True))) for n, pairs in found.items()}


def test_below_5000_examples_the_best_batch_is_the_smallest_that_trains(accuracies):
    """Figure 6, slope over all N: one place below the best accuracy falls off, one above it hardly moves."""
    small = {n: curve for n, curve in curves(accuracies).items() if n <= 5000}
    best = {}
    for n, (sizes, values) in small.items():
        top = int(values.argmax())
        assert 0 < top < len(sizes) - 1, n
        below, above = values[top] - values[top - 1], values[top] - values[top + 1]
        assert below > 1.5 * above, n
        best[n] = sizes[top]
    assert len(best) == 3
    assert max(best.values()) / min(best.values()) < 1.5  # while N grows five times


def test_from_20000_examples_on_the_peaks_are_flat(accuracies):
    """Figure 6, slope from N = 20,000 on: over an octave and a half, accuracy moves by 0.15 points at most."""
    large = {n: curve for n, curve in curves(accuracies).items() if n >= 20_000}
    assert len(large) == 3
    for n, (sizes, values) in large.items():
        octaves = np.log2(sizes / sizes[values.argmax()])
        near = (octaves >= -0.6) & (octaves <= 1.01)
        assert near.sum() >= 3, n
        assert np.ptp(values[near]) < 0.0015, n


def test_a_constant_ratio_fails_where_training_begins_to(accuracies):
    """(d): B/ε = 160 is as good as 240, where the rule holds, for small ε, and falls behind as ε grows."""

    def at(ratio, rate):
        size, steps = round(ratio * rate), round(PAPER.training_time / rate)
        return accuracies.get(Run(PAPER.num_examples, size, rate, PAPER.momentum, 0.0, steps, 0))

    lost = [at(240, rate) - at(160, rate) for rate in PAPER.learning_rates if at(160, rate) and at(240, rate)]
    assert len(lost) >= 5
    assert abs(lost[0]) < 0.003
    assert min(lost[2:]) > 0.004
    assert lost[-1] > 0.02


def one_n(accuracies):
    """The runs of (f) at N = 1,000: g, B, m, accuracy."""
    runs = [run for run in accuracies if run.num_examples == PAPER.num_examples and run.noise_scale > 0]
    runs = [run for run in runs if run.learning_rate in PAPER.learning_rates]
    columns = [[run.noise_scale, run.batch_size, run.momentum, accuracies[run]] for run in runs]
    return np.array(columns).T


def test_what_g_does_not_explain_is_the_largest_momentum_and_the_cliff(accuracies):
    """(f): without m = 0.975, settings of one g are within 0.6 points of each other where they train well."""
    scale, size, momentum, accuracy = one_n(accuracies)
    usual = momentum < max(PAPER.momenta)
    assert explained(scale[usual], accuracy[usual]) > explained(scale, accuracy) + 0.02
    trained = usual & (scale < 45) & (scale > 14)
    ranges = []
    for g in np.unique(scale[trained]):
        same = trained & (np.abs(np.log(scale / g)) < 0.03)
        if same.sum() >= 4:
            ranges.append(size[same].max() / size[same].min())
            assert np.ptp(accuracy[same]) < 0.006, g
    assert len(ranges) >= 10
    assert max(ranges) >= 8
    lost = [
        accuracy[usual & (np.abs(np.log(scale / g)) < 0.15)].min() - value
        for g, value in zip(scale[~usual], accuracy[~usual], strict=True)
        if 10 < g < 45
    ]
    assert len(lost) >= 4
    assert min(lost) > 0.0
    assert 0.005 < np.mean(lost) < 0.015


def means(file, key, **fixed):
    """Value of the key -> means over seeds of the columns of a table, for rows with fixed values."""
    found = defaultdict(list)
    with (RESULTS / "paper" / file).open() as lines:
        for row in csv.DictReader(lines):
            if all(row[name] == value for name, value in fixed.items()):
                found[float(row[key])].append(row)
    numbers = [name for name, value in row.items() if value.replace(".", "").replace("-", "").isdigit()]
    return {
        at: {name: np.mean([float(row[name]) for row in rows]) for name in numbers}
        for at, rows in sorted(found.items())
    }


def test_what_the_choice_of_l2_by_each_structure_costs():
    """(b): the exact evidence orders the nets as test cross-entropy does; kron and diag cost 0.03 and 0.15 nats."""
    nets = means("nets.csv", "prior_precision", labels="true")
    columns = {
        "exact": "log_evidence_ratio",
        "kron": "kron_log_evidence_ratio",
        "diag": "diag_log_evidence_ratio",
    }
    loss = {at: row["test_loss"] for at, row in nets.items()}
    exact = {at: row[columns["exact"]] for at, row in nets.items()}
    assert len(nets) == 9
    assert sorted(loss, key=loss.get) == sorted(exact, key=exact.get, reverse=True)
    best = {name: max(nets, key=lambda at: nets[at][column]) for name, column in columns.items()}
    costs = [loss[best[name]] - min(loss.values()) for name in columns]
    assert costs == pytest.approx([0.0, 0.03, 0.15], abs=0.005)
    assert min(loss.values()) == pytest.approx(0.31, abs=0.005)
    there = nets[best["exact"]]
    short = [there[columns[name]] - there[columns["exact"]] for name in ("kron", "diag")]
    assert short == pytest.approx([-400, -2450], rel=0.02)


def test_the_flattest_nets_are_the_worst():
    """(c): B = 16 by both measures of sharpness, for its L2 penalty; and how far from a minimum the nets are."""
    nets = means("sharpness.csv", "batch_size")
    for column, largest in (("largest_eigenvalue", False), ("trace", False), ("test_loss", True)):
        assert sorted(nets, key=lambda b: nets[b][column], reverse=largest)[0] == 16, column
    assert min(nets, key=lambda b: nets[b]["log_evidence_ratio"]) == 16
    assert [nets[b]["weight_penalty"] for b in (16, 32)] == pytest.approx([947, 245], abs=1)
    decrements = [row["newton_decrement"] for size, row in nets.items() if size > 16]
    assert (min(decrements), max(decrements)) == pytest.approx((144, 229), abs=1)
    assert nets[16]["newton_decrement"] == pytest.approx(1103, abs=1)
    assert nets[32]["log_evidence_ratio"] - nets[1000]["log_evidence_ratio"] == pytest.approx(140, abs=1)


def test_where_laplace_ends():
    """(e): mean −ln P of the chains over that of Laplace's Gaussian, and the variances of the stiffest directions."""
    chains = means("langevin.csv", "prior_precision")
    ratios = [row["sampled_loss"] / row["laplace_loss"] for row in chains.values()]
    assert list(chains) == [10.0, 100.0, 1000.0]
    assert ratios == pytest.approx([0.54, 0.93, 0.99], abs=0.01)
    assert [row["stiff_variance_ratio"] for row in chains.values()] == pytest.approx(
        [1.10, 1.02, 1.01], abs=0.01
    )

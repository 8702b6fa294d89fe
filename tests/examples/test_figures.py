"""Each figure at a reduced size, on real digits: the claim's direction must come out."""

import csv

import pytest

from examples.smith_le_2018 import cli
from examples.smith_le_2018.evidence_presets import EvidencePreset
from examples.smith_le_2018.presets import Preset

REDUCED = Preset(
    name="reduced",
    seeds=2,
    num_examples=400,
    learning_rate=0.2,
    momentum=0.9,
    training_time=20,
    batch_sizes=(4, 48, 400),
    around=(16, 24, 32, 48, 64),
    learning_rates=(0.2, 0.4, 0.8),
    too_large=(3.2,),
    longer=0.4,
    momenta=(0.8, 0.9, 0.95),
    by_num_examples={400: (24, 32, 48, 64), 2000: (32, 48, 64, 96, 128)},
    small_batch=48,
    prior_precisions=(0.0, 2.0),
    points=4,
    evidence=EvidencePreset(
        logistic_seeds=2,
        logistic_examples=100,
        logistic_precisions=(1e-4, 1.0, 100.0, 1e4, 1e5),
        lightning_precision=1.0,
        net_seeds=2,
        net_examples=100,
        net_hidden=60,
        net_precisions=(0.1, 1.0, 10.0),
        random_precisions=(0.1, 10.0),
        sharpness_batches=(10, 100),
        sharpness_rate=0.1,
        sharpness_loss=0.02,
        sharpness_precision=1.0,
        langevin_seeds=2,
        langevin_precisions=(100.0, 1000.0),
        langevin_chains=16,
        langevin_times=5.0,
    ),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def claims(tmp_path_factory):
    """Estimates by figure, in the order of the table."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cli.PRESETS, "quick", REDUCED)
        cli.main(["all", "--results", str(folder), "--workers", "1"])
    with (folder / "reduced" / "claims.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row["estimate"]) for row in rows if row["figure"] == name] for name in cli.FIGURES}


def test_figure_1_only_true_labels_generalise(claims):
    train_true, train_random, test_true, test_random = claims["fig1"]
    assert train_true > 0.99 and train_random > 0.9 and test_true > 0.98
    assert abs(test_random - 0.5) < 0.07


def test_figure_2_evidence_ranks_l2_and_sees_through_random_labels(claims):
    correlation, _, true, weak_random, random, lightning = claims["fig2"]
    assert correlation > 0.5
    assert true > 50 and weak_random < -50 and random < 1
    assert abs(lightning) < 1e-3


def test_memorise_exact_evidence_sees_through_random_labels(claims):
    memorised, random, difference, best, largest_random = claims["memorise"]
    assert memorised > 0.99
    assert random < 0 < difference and best > 0 and largest_random < best


def test_l2_exact_evidence_chooses_better_than_kron_and_diag(claims):
    """Each structure has three rows: decades off, cost of the choice, rank correlation."""
    exact, kron, diag = (claims["l2"][first + 1] for first in (0, 3, 6))
    assert exact <= kron <= diag + 1e-9
    assert exact < 0.05


def test_sharpness_large_batches_end_in_sharper_minima(claims):
    # Which batch size the evidence prefers is not settled by 100 examples and two seeds.
    eigenvalue, trace, *_ = claims["sharpness"]
    assert eigenvalue > 0 and trace > 0


def test_langevin_noise_samples_laplaces_posterior(claims):
    """Variances along stiff eigenvectors, along all, and the mean log-likelihood, for two λ."""
    for value in claims["langevin"]:
        assert abs(value - 1) < 0.15


def test_figure_3_small_batches_generalise_better_and_l2_shrinks_the_gap(claims):
    gap, shrinking = claims["fig3"]
    assert gap > 0.005 and shrinking > 0


def test_figure_4_the_best_batch_lies_inside(claims):
    over_smallest, over_full = claims["fig4"]
    assert over_smallest > 0.3 and over_full > 0.005


def test_figure_5_the_best_batch_grows_with_the_learning_rate(claims):
    slope, ratio = claims["fig5"]
    assert 0.5 < slope < 1.5 and 0.3 < ratio < 3


def test_figure_6_the_best_batch_grows_with_the_training_set(claims):
    assert 0 < claims["fig6"][-1] < 1.5


def test_figure_7_the_best_batch_grows_with_momentum(claims):
    assert 0.2 < claims["fig7"][0] < 1.5


def test_goyal_accuracy_hardly_moves_while_the_ratio_is_kept(claims):
    assert abs(claims["goyal"][0]) < 0.05


def test_collapse_the_noise_scale_says_more_than_the_batch_size(claims):
    assert claims["collapse"][0] > 0.1

"""Each figure at a reduced size, on real digits: the claim's direction must come out."""

import csv

import pytest

from examples.smith_le_2018 import cli
from examples.smith_le_2018.presets import Preset

REDUCED = Preset(
    name="reduced",
    seeds=2,
    num_examples=500,
    learning_rate=0.2,
    momentum=0.9,
    training_time=30,
    batch_sizes=(4, 48, 500),
    around=(16, 24, 32, 48, 64, 96),
    learning_rates=(0.1, 0.2, 0.4),
    too_large=(1.6,),
    longer=0.1,
    momenta=(0.8, 0.9, 0.95),
    by_num_examples={500: (24, 32, 48, 64), 4000: (48, 64, 96, 128, 192)},
    small_batch=48,
    prior_precisions=(0.0, 10.0),
    points=6,
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

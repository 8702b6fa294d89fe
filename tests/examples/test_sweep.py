"""Sweeps resume, never repeat a run, and do not depend on how many processes share them."""

import shutil

import pytest

from examples.smith_le_2018 import cli, sweep
from examples.smith_le_2018.data import load_digits, training_set
from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.sweep import RunTable
from tests.examples.digits import TINY, made_digits

RUNS = [Run(40, size, 0.05, 0.9, 0.0, 6, seed) for seed in (0, 1) for size in (4, 8)]


@pytest.fixture
def trained(monkeypatch):
    """Runs that were trained, in order; on digits that were made."""
    seen = []

    def train(digits, run, moments):
        seen.append(run)
        return original(digits, run, moments)

    original = sweep.train
    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "load_digits", lambda root: made_digits())
    return seen


def last_step(run):
    return [run.steps]


def test_finished_runs_are_not_repeated(tmp_path, trained):
    RunTable(tmp_path).measure("a", RUNS, last_step)
    RunTable(tmp_path).measure("b", [*RUNS, RUNS[0], Run(40, 16, 0.05, 0.9, 0.0, 6, 0)], last_step)
    assert trained == [*RUNS, Run(40, 16, 0.05, 0.9, 0.0, 6, 0)]


def test_what_was_done_before_an_interruption_is_kept(tmp_path, trained, monkeypatch):
    counted = sweep.train

    def interrupted(digits, run, moments):
        if run == RUNS[2]:
            raise KeyboardInterrupt
        return counted(digits, run, moments)

    monkeypatch.setattr(sweep, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RunTable(tmp_path).measure("a", RUNS, last_step)
    monkeypatch.setattr(sweep, "train", counted)
    table = RunTable(tmp_path)
    table.measure("a", RUNS, last_step)
    assert trained == RUNS
    assert [table.find(run)["batch_size"] for run in RUNS] == [4, 8, 4, 8]


def test_progress_says_what_and_how_long(tmp_path, trained):
    lines = []
    RunTable(tmp_path, report=lines.append).measure("fig9", RUNS, last_step)
    assert lines[-1].startswith(
        "fig9: 4 of 4 runs, 0.0 min left. N=40 B=8 ε=0.05 m=0.9 L2=0 seed=1: test accuracy"
    )


def test_a_value_that_is_not_there_says_so(tmp_path, trained):
    with pytest.raises(KeyError, match="call `measure` first"):
        RunTable(tmp_path).value("test_accuracy", RUNS[0])


def test_moments_on_the_way_are_measured_and_asked_for(tmp_path, trained):
    table = RunTable(tmp_path)
    table.measure("a", RUNS[:1], last_step)
    table.measure("b", RUNS[:1], lambda run: [2])
    assert trained == [RUNS[0], RUNS[0]]
    assert [row["step"] for row in table.table.rows] == [6, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_pools")
def test_number_of_processes_does_not_matter(tmp_path):
    runs = [Run(100, size, 0.05, 0.9, 0.0, 20, seed=1) for size in (5, 10, 20)]

    def measured(workers):
        with RunTable(tmp_path / str(workers), workers=workers) as table:
            table.measure("a", runs[:1], last_step)
            table.measure("b", runs, last_step)
            return [table.find(run) | {"seconds": 0} for run in runs]

    assert measured(1) == measured(2)


def test_training_sets_are_nested_and_never_hold_a_test_image():
    digits = load_digits()
    small, labels = training_set(digits, 500, seed=4)
    large, _ = training_set(digits, 1000, seed=4)
    assert (large[:500] == small).all() and labels.bincount().min() > 20
    test = {image.numpy().tobytes() for image in digits.test_images}
    assert len(digits.test_labels) == 1000 and not test & {
        image.numpy().tobytes() for image in digits.train_images
    }
    with pytest.raises(ValueError, match=r"from 1 to 4000, .* but got 5000. Give `--mnist-root`"):
        training_set(digits, 5000, seed=0)


@pytest.mark.slow
def test_command_makes_every_figure_and_draws_again_without_training(
    tmp_path, tiny_results, monkeypatch, capsys
):
    results, printed = tiny_results
    first = (results / "tiny" / "claims.md").read_text()
    for name in cli.FIGURES:
        assert (results / "tiny" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"| {name} |" in first
    assert " left. " in printed
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    for figure in (tmp_path / "tiny").glob("*.png"):
        figure.unlink()
    monkeypatch.setitem(cli.PRESETS, "quick", TINY)
    cli.main(["all", "--results", str(tmp_path), "--workers", "1", "--draw-only"])
    assert (tmp_path / "tiny" / "claims.md").read_text() == first
    assert {path.stem for path in (tmp_path / "tiny").glob("*.png")} == set(cli.FIGURES)
    assert " left. " not in capsys.readouterr().out

"""The results in the repository are what the command gives: rows drawn at random are run once more."""

import dataclasses
import os
import random
import re
from pathlib import Path

import pytest

from examples.smith_le_2018 import cli, engine, logistic, settled, sharpness
from examples.smith_le_2018.check import FILES, Comparison, Differs, check, compare_again, settled_rows
from examples.smith_le_2018.cli import RESULTS
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.presets import PRESETS
from examples.smith_le_2018.sweep import RunTable

MNIST = os.environ.get("MNIST_ROOT")
"""Folder of the whole of MNIST, which is not downloaded for a test."""
ROOTS = {"quick": None, "paper": None if MNIST is None else Path(MNIST)}


def committed(name, report=print):
    folder, root = RESULTS / name, ROOTS[name]
    return Context(PRESETS[name], PRESETS[name].seeds, folder, root, RunTable(folder, root), report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROOTS)
def test_random_rows_come_out_again(name):
    if name == "paper" and ROOTS[name] is None:
        pytest.skip("needs the whole of MNIST: set MNIST_ROOT")
    check(committed(name), seed=37)  # a draw whose rows are soon done


def changed(**values):
    """A fault: a function that takes one of the example's settings gets another in its place."""

    def wrap(function, place):
        def run(*arguments):
            arguments = list(arguments)
            settings = arguments[place]
            new = {key: change(getattr(settings, key)) for key, change in values.items()}
            arguments[place] = dataclasses.replace(settings, **new)
            return function(*arguments)

        return run

    return wrap


def fewer(function, _):
    """A fault: N is half of what it should be."""
    return lambda digits, size, seed: tuple(part[: len(part) // 2] for part in function(digits, size, seed))


def more_prior(function, _):
    """A fault: λ is half as large again."""
    return lambda inputs, labels, precision: function(inputs, labels, 1.5 * precision)


# Name to (file, module, what in it is at fault, place of the settings among its arguments, the fault).
FAULTS = {
    "a learning rate": (
        "runs",
        engine.Trained,
        "__init__",
        4,
        changed(learning_rate=lambda rate: 1.5 * rate),
    ),
    "a momentum": ("runs", engine.Trained, "__init__", 4, changed(momentum=lambda momentum: momentum - 0.1)),
    "an L2": ("runs", engine.Trained, "__init__", 4, changed(weight_decay=lambda decay: decay + 1e-3)),
    "N of a run": ("runs", engine, "training_set", None, fewer),
    "N of a net": ("nets", settled, "training_set", None, fewer),
    "N of sharpness": ("sharpness", sharpness, "training_set", None, fewer),
    "λ of a net": (
        "nets",
        settled,
        "settle",
        None,
        lambda function, _: lambda net, x, y, precision: function(net, x, y, 1.5 * precision),
    ),
    "λ of a regression": ("logistic", logistic, "fit", None, more_prior),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_setting_is_seen(monkeypatch, name):
    """By each of two draws, of all that there could be; by one of a net, which takes seconds to settle."""
    file, module, attribute, place, fault = FAULTS[name]
    monkeypatch.setattr(module, attribute, fault(getattr(module, attribute), place))
    if file == "runs" and name.startswith("N of"):
        # Batches are drawn from the images that are left.
        monkeypatch.setattr(engine, "_steps", steps_of_half)
    for seed in range(1 if file == "nets" else 2):
        with pytest.raises(Differs, match=rf"--check-seed {seed} got\n{file}\.csv"):
            check(committed("quick", lambda line: None), seed=seed, rows=1, files=[file])


STEPS = engine._steps


def steps_of_half(run):
    return STEPS(dataclasses.replace(run, num_examples=run.num_examples // 2))


def test_rows_are_of_settings_that_fit_in_every_seed():
    """Those at the cliff are left out with all their seeds, and tolerances are those of the seeds."""
    table = committed("quick").runs.table
    rows, allowed = settled_rows("runs", table.rows)
    assert 40 < len(rows) < 120
    for row in rows:
        others = [
            one
            for one in table.rows
            if all(
                one[k] == row[k] for k in ("step", *engine.Run.__annotations__) if k in row and k != "seed"
            )
        ]
        assert len(others) == 4
        assert all(one["train_accuracy"] == 1.0 and one["train_loss"] < 0.01 for one in others)
    assert 0.1 < allowed["train_loss"] < 0.4
    assert 0.01 < allowed["test_accuracy"] < 0.05


@pytest.mark.parametrize(
    ("before", "now", "agrees"),
    [
        (1.0, 1.09, True),
        (1.09, 1.0, True),
        (1.0, 1.11, False),
        (-2.0, -2.1, True),
        (0.0, 0.0, True),
        (1.0, -1.0, False),
        (0.0, 0.1, False),
        (1.0, float("nan"), False),
        (1.0, float("inf"), False),
    ],
)
def test_what_agrees(before, now, agrees):
    assert Comparison("column", before, now, 0.1).agrees is agrees


def test_a_difference_ends_the_command_with_its_seed_and_no_traceback(monkeypatch, capsys):
    """And the seed that is printed draws the same rows."""
    monkeypatch.setattr("examples.smith_le_2018.check.FILES", {"logistic": FILES["logistic"]})
    monkeypatch.setattr("examples.smith_le_2018.check.check.__defaults__", (None, 1, ("logistic",)))
    cli.main(["check"])
    first = capsys.readouterr().out
    seed = re.search(r"--check-seed (\d+)", first)[1]
    cli.main(["check", "--check-seed", seed])
    assert capsys.readouterr().out == first
    monkeypatch.setattr(logistic, "fit", more_prior(logistic.fit, None))
    with pytest.raises(
        SystemExit, match=rf"smith_le_2018: Expected [^\n]*--check-seed {seed} got\nlogistic.csv"
    ):
        cli.main(["check", "--check-seed", seed])


def test_draws_of_one_file_do_not_hang_on_the_others():
    context = committed("quick")
    (one, _), (again, _) = (
        compare_again("logistic", context, random.Random("logistic 3"))[0] for _ in range(2)
    )
    assert one == again

"""The example on batch growth: its verdict on made-up curves, and a short run of the whole."""

import csv
import sys

import pytest

from examples.grow_the_batch import ARMS, main, summarize


def curves(growth, updates):
    """Last accuracies of three seeds under growth beside 0.90, 0.91 and 0.92 under decay."""
    accuracies = {"constant": (0.5, 0.5, 0.5), "decay": (0.90, 0.91, 0.92), "growth": growth}
    steps = {"constant": 100, "decay": 100, "growth": updates}
    return {(arm, seed): [(1, steps[arm], accuracies[arm][seed])] for arm in ARMS for seed in range(3)}


@pytest.mark.parametrize(
    ("growth", "updates", "holds"),
    [
        ((0.91, 0.90, 0.93), 50, True),  # +1, -1, +1 points: 0.33 ± 0.67
        ((0.91, 0.90, 0.93), 51, False),  # more than half the updates
        ((0.88, 0.89, 0.91), 50, False),  # -2, -2, -1 points: -1.67 ± 0.33
    ],
)
def test_verdict(growth, updates, holds):
    table, verdict = summarize(curves(growth, updates), range(3))
    assert verdict is holds
    assert f"| growth | {updates} |" in table


@pytest.mark.slow
def test_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grow_the_batch.py", "--seeds", "2", "--epochs", "3"])
    # Two seeds of three epochs decide nothing: either verdict, but no breakdown.
    verdicts = {0: "The claim holds.", 1: "The claim does not hold."}
    status = main()
    printed = capsys.readouterr().out
    assert printed.strip().splitlines()[-1] == verdicts[status]
    folder = tmp_path / "grow_the_batch"
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "curves.csv").read_text().splitlines()))
    last = {row["arm"]: int(row["updates"]) for row in rows if row["epoch"] == "3"}
    # 4,000 examples in batches of 32; then of 160 and 400 where the batch grows
    assert last == {"constant": 375, "decay": 375, "growth": 125 + 25 + 10}
    assert all(0.1 < float(row["test_accuracy"]) <= 1 for row in rows)
    assert (folder / "table.md").read_text() in printed

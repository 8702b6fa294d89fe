"""The example on batch growth: its verdict on made-up curves, and a short run of the whole."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from examples.grow_the_batch import ARMS, summarize

SCRIPT = Path(__file__).parents[1] / "examples" / "grow_the_batch.py"


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
def test_runs(tmp_path):
    command = [sys.executable, str(SCRIPT), "--seeds", "2", "--epochs", "3"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    # Two seeds of three epochs decide nothing: either verdict, but no breakdown.
    assert finished.returncode in (0, 1), finished.stderr[-3000:]
    assert finished.stdout.strip().splitlines()[-1] in ("The claim holds.", "The claim does not hold.")
    folder = tmp_path / "grow_the_batch"
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "curves.csv").read_text().splitlines()))
    last = {row["arm"]: int(row["updates"]) for row in rows if row["epoch"] == "3"}
    # 4,000 examples in batches of 32; then of 160 and 400 where the batch grows
    assert last == {"constant": 375, "decay": 375, "growth": 125 + 25 + 10}
    assert all(0.1 < float(row["test_accuracy"]) <= 1 for row in rows)
    assert (folder / "table.md").read_text() in finished.stdout

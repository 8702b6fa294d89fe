"""The results in the repository are what the command gives: rows drawn at random are run once more."""

import os
import random
from pathlib import Path

import pytest

from examples.smith_le_2018.check import RELATIVE, TOLERANCE, differences, trial_differences
from examples.smith_le_2018.cli import RESULTS
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.presets import PRESETS
from examples.smith_le_2018.sweep import RunTable

MNIST = os.environ.get("MNIST_ROOT")
"""Folder of the whole of MNIST, which is not downloaded for a test."""
ROOTS = {"quick": None, "paper": None if MNIST is None else Path(MNIST)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROOTS)
def test_random_rows_come_out_again(name):
    folder, root = RESULTS / name, ROOTS[name]
    if name == "paper" and root is None:
        pytest.skip("needs the whole of MNIST: set MNIST_ROOT")
    runs = RunTable(folder, root)
    context = Context(PRESETS[name], PRESETS[name].seeds, folder, root, runs)
    for row, accuracy in differences(context, 2, random.Random(0)):
        assert accuracy == pytest.approx(row["test_accuracy"], abs=TOLERANCE), runs.run_of(row)
    for kind, row, now in trial_differences(context, random.Random(0)):
        assert now == pytest.approx(row[kind.headline], rel=RELATIVE, abs=RELATIVE), row

"""Rows of the CSVs once more: the settings and the seed in a row are all that its numbers come from."""

from __future__ import annotations

import random

import torch

from examples.smith_le_2018.context import Context
from examples.smith_le_2018.data import Unavailable, load_digits
from examples.smith_le_2018.engine import train
from examples.smith_le_2018.langevin import LANGEVIN
from examples.smith_le_2018.logistic import LOGISTIC
from examples.smith_le_2018.results import Row
from examples.smith_le_2018.settled import NETS
from examples.smith_le_2018.sharpness import SHARPNESS
from examples.smith_le_2018.sweep import cost
from examples.smith_le_2018.trials import Kind, Trials

__all__ = ["KINDS", "RELATIVE", "TOLERANCE", "check", "differences", "trial_differences"]

TOLERANCE = 0.005
"""In test accuracy. On one machine nothing differs; another one's sums round otherwise, and training amplifies it."""
RELATIVE = 0.02
"""Likewise, of the headline numbers of the trials."""
KINDS = (LOGISTIC, NETS, SHARPNESS, LANGEVIN)
CHEAP = 0.5
"""Of the runs that were trained to the end, the cheaper share is what is run once more."""


def check(context: Context, rows: int = 2) -> None:
    """Run some rows of `runs.csv` again, and one of each other file, drawn at random, and say what came out.

    Args:
        context: whose files they are.
        rows: how many of `runs.csv`.

    Raises:
        ValueError: if a number differs by more than its tolerance.
    """
    worst = 0.0
    for kind, row, now in trial_differences(context, random.Random()):
        before = float(row[kind.headline])
        context.report(f"{kind.name}.csv, {kind.headline}: {before:.6g} in the file, {now:.6g} now")
        if abs(now - before) > RELATIVE * max(1.0, abs(before)):
            raise ValueError(
                f"Expected the same {kind.headline} within {RELATIVE:.0%}, but got {now} of {row}."
            )
    for row, accuracy in differences(context, rows, random.Random()):
        difference = abs(accuracy - float(row["test_accuracy"]))
        worst = max(worst, difference)
        context.report(
            f"{context.runs.run_of(row)}: test accuracy {row['test_accuracy']} in the file, {accuracy} now"
        )
    if worst > TOLERANCE:
        raise ValueError(
            f"Expected the same test accuracies within {TOLERANCE}, but one differs by {worst:.4f}."
        )


def differences(context: Context, rows: int, draw: random.Random) -> list[tuple[Row, float]]:
    """Rows of the file, each with the test accuracy that its run reaches now.

    Drawn from the runs that fit their training set; one that never settles differs after a rounding.

    Raises:
        Unavailable: if there are too few.
    """
    table = context.runs
    settled = [
        row for row in table.table.rows if row["digits"] == table.digits and float(row["train_loss"]) < 0.01
    ]
    if len(settled) < rows:
        raise Unavailable(
            f"Expected {table.table.path} to have at least {rows} runs on {table.digits} that fit their training set,"
            f" but got {len(settled)}. Make a figure first."
        )
    settled.sort(key=lambda row: cost(table.run_of(row)))
    chosen = draw.sample(settled[: max(rows, round(CHEAP * len(settled)))], rows)
    torch.set_num_threads(1)
    digits = load_digits(context.mnist_root)
    return [(row, train(digits, table.run_of(row))[-1].test_accuracy) for row in chosen]


def trial_differences(context: Context, draw: random.Random) -> list[tuple[Kind, Row, float]]:
    """One row of each file of trials that is there, with the headline number that its settings give now."""
    found = []
    for kind in KINDS:
        trials = Trials(kind, context)
        rows = [row for row in trials.table.rows if row["digits"] == trials.digits]
        if rows:
            rows.sort(key=lambda row: float(row["seconds"]))
            row = draw.choice(rows[: max(1, round(CHEAP * len(rows)))])
            found.append((kind, row, float(trials.again(row)[kind.headline])))
    return found

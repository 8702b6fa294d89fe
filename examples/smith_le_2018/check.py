"""Rows of the CSVs once more: the settings and the seed in a row are all that its numbers come from.

Training amplifies a rounding, and each processor rounds in its own way. So only numbers are compared that do not
hang on the last bit: of settings that have settled in every seed, and whose numbers are nearly those of the other
seeds. What a rounding moves is then less than what a seed does, and the file itself says how much that is.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from examples.smith_le_2018.context import Context
from examples.smith_le_2018.data import Unavailable, load_digits
from examples.smith_le_2018.engine import train
from examples.smith_le_2018.langevin import LANGEVIN
from examples.smith_le_2018.logistic import CONVERGED, LOGISTIC
from examples.smith_le_2018.results import Row
from examples.smith_le_2018.settled import NETS, SETTLED
from examples.smith_le_2018.sharpness import SHARPNESS
from examples.smith_le_2018.sweep import SETTINGS, cost
from examples.smith_le_2018.trials import Trials

__all__ = ["FILES", "Comparison", "Differs", "Number", "Settled", "check", "compare_again", "settled_rows"]

SPREADS = 4.0
"""Standard deviations over seeds that a number may differ by."""
LARGEST_SPREAD = 0.1
"""Relative standard deviation over seeds up to which a setting's numbers count as no matter of luck."""
LEAST_SPREAD = 1e-3
"""Where all seeds give one number (an accuracy of 1, say), they do not tell what a rounding does."""
CHEAP = 0.5
"""Of the rows that can be compared, the cheaper share is what is run once more."""


class Differs(ValueError):
    """A number of the files does not come out again. The command ends with its message."""


@dataclass(frozen=True)
class Number:
    """A column that is compared.

    Attributes:
        column: its name; its values are positive where they are compared by their spread.
        allowed: relative difference; None for that by the spread over seeds.
        steady: whether a setting is left out whose seeds differ in it by more than `LARGEST_SPREAD`.
    """

    column: str
    allowed: float | None = None
    steady: bool = True


@dataclass(frozen=True)
class Settled:
    """What is compared of a file, and of which rows.

    Attributes:
        holds: whether a row has settled; all seeds of a setting must have.
        numbers: what is compared.
    """

    holds: Callable[[Row], bool]
    numbers: tuple[Number, ...]


@dataclass(frozen=True)
class Comparison:
    """One number, in the file and now, and the relative difference that is allowed (of their logarithms)."""

    column: str
    before: float
    now: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether it is the same number but for what a rounding may do."""
        if self.before == self.now:
            return True
        if self.before * self.now <= 0 or not math.isfinite(self.now):
            return False
        return abs(math.log(self.now / self.before)) <= self.allowed


FILES: dict[str, Settled] = {
    # Fits without an error, and its loss falls steadily.
    "runs": Settled(
        lambda row: row["train_accuracy"] == 1.0 and row["train_loss"] < 0.01,
        (Number("train_loss"), Number("test_accuracy")),
    ),
    # A convex cost and its one minimum, in float64.
    "logistic": Settled(
        lambda row: row["newton_decrement"] < CONVERGED,
        (Number("log_evidence_ratio", 1e-4), Number("train_loss", 1e-3)),
    ),
    # Which minimum a net ends in is a matter of roundings; at one it is, and such minima resemble each other.
    "nets": Settled(
        lambda row: row["decrement_bound"] < 2 * SETTLED,
        (Number("log_evidence_ratio"), Number("weight_penalty"), Number("train_loss")),
    ),
    "sharpness": Settled(
        lambda row: True,  # each ends at the loss that was asked for
        (
            Number("log_evidence_ratio"),
            Number("weight_penalty"),
            Number("trace"),
            Number("largest_eigenvalue", steady=False),
        ),
    ),
    # The minimum is that of a convex cost; the noise is drawn along eigenvectors, whose signs are free.
    "langevin": Settled(
        lambda row: True,
        (Number("stiff_variance_ratio"), Number("sampled_loss"), Number("loss_at_minimum", 1e-3)),
    ),
}
"""CSV file to what is compared of it."""
KINDS = {kind.name: kind for kind in (LOGISTIC, NETS, SHARPNESS, LANGEVIN)}


def check(
    context: Context, seed: int | None = None, rows: int = 2, files: Sequence[str] = tuple(FILES)
) -> None:
    """Run some rows of `runs.csv` again, and one of each other file, drawn at random, and say what came out.

    Args:
        context: whose files they are.
        seed: of the draw; a new one by default. It is reported.
        rows: how many of `runs.csv`.
        files: names of those to look at.

    Raises:
        Differs: if a number differs by more than its tolerance.
        Unavailable: if no row can be compared.
    """
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    context.report(f"check: rows drawn with --check-seed {seed}")
    differing: list[str] = []
    for name in files:
        # A generator for each file, so that what is drawn of one does not hang on what another one has.
        draw = random.Random(f"{name} {seed}")
        for _ in range(rows if name == "runs" else 1):
            for row, comparisons in compare_again(name, context, draw):
                for one in comparisons:
                    line = _line(name, row, one)
                    context.report(line)
                    if not one.agrees:
                        differing.append(line)
    if differing:
        raise Differs(
            f"Expected the numbers of the files in {context.folder} to come out again, but of the rows drawn with"
            f" --check-seed {seed} got\n" + "\n".join(differing)
        )


def compare_again(name: str, context: Context, draw: random.Random) -> list[tuple[Row, list[Comparison]]]:
    """Draw a row of a file, do what it stands for once more, and compare.

    Args:
        name: of the file.
        context: whose it is.
        draw: chooses the row.

    Returns:
        The row with its comparisons; nothing where there is no such file of trials.

    Raises:
        Unavailable: if the file has no row that can be compared.
    """
    trials = None if name == "runs" else Trials(KINDS[name], context)
    table = context.runs.table if trials is None else trials.table
    mine = [row for row in table.rows if row["digits"] == context.runs.digits]
    if not mine and trials is not None:
        return []
    candidates, allowed = settled_rows(name, mine)
    if not candidates:
        raise Unavailable(
            f"Expected {table.path} to have a setting on {context.runs.digits} that has settled in several seeds,"
            " but there is none. Make a figure first."
        )
    price: Callable[[Row], float] = lambda row: (  # noqa: E731 - two ways of one sort
        cost(context.runs.run_of(row)) if trials is None else float(row["seconds"])
    )
    candidates.sort(key=price)
    row = draw.choice(candidates[: max(1, round(CHEAP * len(candidates)))])
    now = _again(context, row) if trials is None else trials.again(row)
    return [(row, compare(name, row, now, allowed))]


def compare(name: str, row: Row, now: Row, allowed: Mapping[str, float]) -> list[Comparison]:
    """What the file has of a row, beside what came out now."""
    return [
        Comparison(one.column, float(row[one.column]), float(now[one.column]), allowed[one.column])
        for one in FILES[name].numbers
    ]


def settled_rows(name: str, rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
    """The rows of a file that can be compared, and the relative differences that are allowed.

    Args:
        name: of the file.
        rows: all of it on these digits.

    Returns:
        (rows, column to the largest difference allowed of its logarithm). The spread is pooled over the settings,
        since that of the few seeds of one is itself uncertain.
    """
    rule = FILES[name]
    by_setting: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        by_setting.setdefault(tuple(row[column] for column in _settings(name)), []).append(row)
    groups = [group for group in by_setting.values() if all(map(rule.holds, group)) and _steady(rule, group)]
    spreads = {
        one.column: [_spread(one, group) for group in groups] for one in rule.numbers if one.allowed is None
    }
    pooled = {
        column: math.sqrt(statistics.fmean(s * s for s in each)) for column, each in spreads.items() if each
    }
    allowed = {
        one.column: SPREADS * max(pooled.get(one.column, 0.0), LEAST_SPREAD)
        if one.allowed is None
        else one.allowed
        for one in rule.numbers
    }
    return [row for group in groups for row in group], allowed


def _steady(rule: Settled, group: Sequence[Row]) -> bool:
    by_spread = [one for one in rule.numbers if one.allowed is None]
    if not by_spread:
        return True
    if len(group) < 2 or any(float(row[one.column]) <= 0 for row in group for one in by_spread):
        return False
    return all(_spread(one, group) <= LARGEST_SPREAD for one in by_spread if one.steady)


def _spread(number: Number, group: Sequence[Row]) -> float:
    """Standard deviation over seeds of the logarithm."""
    return statistics.stdev(math.log(float(row[number.column])) for row in group)


def _settings(name: str) -> list[str]:
    names = [*SETTINGS, "step"] if name == "runs" else list(KINDS[name].settings.__dataclass_fields__)
    return [column for column in names if column != "seed"]


def _again(context: Context, row: Row) -> Row:
    """What the run of a row reaches now."""
    torch.set_num_threads(1)
    return asdict(train(load_digits(context.mnist_root), context.runs.run_of(row))[-1])


def _line(name: str, row: Row, one: Comparison) -> str:
    settings = ", ".join(f"{column}={row[column]}" for column in [*_settings(name), "seed"])
    verdict = "" if one.agrees else ": DIFFERS"
    return (
        f"{name}.csv, {settings}: {one.column} {one.before:.6g} in the file, {one.now:.6g} now, up to"
        f" {one.allowed:.1%} allowed{verdict}"
    )

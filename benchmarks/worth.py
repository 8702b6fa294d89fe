"""What the parts that a simpler package would do without are worth: time and log-evidence with and without each.

    python benchmarks/worth.py [--repeats 3] [--threads 2] [--output-dir docs/benchmarks]

784-800-10, N = 1000, float32, in one process; with and without take turns. A part stays in the package for as long
as it saves a tenth of the time in one of its uses.

- rows left out of the factor: the exact log-evidence, without by `Budget(left_out_share=2)`.
- columns that choose the rows of a bracket, and their factor in two parts: `tolerance` 1 and 10, without by
  `Budget(marked_rows=10**9)`.
- the fixed point: `prior_precision="optimize"`, without by SciPy's secant method on the same function, to the same
  accuracy.

Writes worth.csv and worth.md. Needs `.[benchmark]`.
"""

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from models import MODELS, SEED, Trained, trained
from scipy.optimize import root_scalar
from worker import copy_of

from lightning_bayes.evidence import search
from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.evidence.laplace import Computation
from lightning_bayes.structures.base import DEFAULT_BUDGET, Budget

ACCURACY = 1e-4
"""In ln λ, of the secant method: about a millionth of a nat on this net."""
WORTHWHILE = 0.1


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output-dir", default="docs/benchmarks")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data, rows = trained(MODELS["mlp-1000"]), []
    for part, (with_it, without) in works_of(data).items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.repeats):
            values = []
            for work, taken in zip((with_it, without), times, strict=True):
                start = time.perf_counter()
                values.append(work())
                taken.append(time.perf_counter() - start)
        seconds = [statistics.median(taken) for taken in times]
        rows.append([part, *seconds, seconds[1] / seconds[0], *values])
        print(rows[-1], flush=True)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    header = ["part", "seconds", "seconds_without", "ratio", "log_evidence", "log_evidence_without"]
    with (folder / "worth.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[*header, "threads", "repeats", "seed"]])
        settings = [arguments.threads, arguments.repeats, SEED]
        csv.writer(file).writerows([*row, *settings] for row in rows)
    (folder / "worth.md").write_text(markdown(rows, arguments), encoding="utf-8")


def works_of(data: Trained) -> dict[str, tuple[Callable[[], float], Callable[[], float]]]:
    """Of each part, what computes a log-evidence with it and without."""
    all_rows, unmarked = Budget(left_out_share=2.0), Budget(marked_rows=10**9)

    def evidence(budget: Budget = DEFAULT_BUDGET, **arguments: object) -> float:
        net, pair = copy_of(data).net, (data.x, data.y)
        computation = Computation(structure="full", batch_size=250, budget=budget, **arguments)  # type: ignore[arg-type]
        return computation.run(net, pair, evidence_of).log_evidence

    def by_secants() -> float:
        with mock.patch.object(search, "mackay_fixed_point", secants):
            return evidence(prior_precision="optimize")

    return {
        "rows left out of the factor, λ = 1": (evidence, lambda: evidence(all_rows)),
        "rows left out of the factor, λ sought": (
            lambda: evidence(prior_precision="optimize"),
            lambda: evidence(all_rows, prior_precision="optimize"),
        ),
        "columns that choose rows, tolerance 1": (
            lambda: evidence(tolerance=1.0),
            lambda: evidence(unmarked, tolerance=1.0),
        ),
        "columns that choose rows, tolerance 10": (
            lambda: evidence(tolerance=10.0),
            lambda: evidence(unmarked, tolerance=10.0),
        ),
        "fixed point": (lambda: evidence(prior_precision="optimize"), by_secants),
    }


def secants(
    gamma: Callable[[float], float], squared_norm: float, start: float, low: float, high: float
) -> float:
    """SciPy's in the place of `mackay_fixed_point`."""

    def rest(x: float) -> float:
        return math.log(gamma(min(max(x, low), high)) / squared_norm) - x

    second = start + rest(start)
    return float(root_scalar(rest, x0=start, x1=second, method="secant", xtol=ACCURACY).root)


def markdown(rows: list[list[object]], arguments: argparse.Namespace) -> str:
    """The table of the docs, with what stays and what does not."""
    lines = [
        f"784-800-10, N = 1000, float32, {arguments.threads} threads, seed {SEED}, medians of {arguments.repeats} in "
        "turn.",
        "",
        "| part | seconds with it | without | ratio | log-evidence with it | without | saves a tenth |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for part, seconds, without, ratio, value, other in rows:
        worth = "yes" if ratio >= 1.0 + WORTHWHILE else "no"  # type: ignore[operator]
        lines.append(
            f"| {part} | {seconds:.2f} | {without:.2f} | {ratio:.2f} | {value:,.4f} | {other:,.4f} | {worth} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""The table of results: one row a run, with every setting, and errors against the exact number."""

import csv
import importlib.metadata
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "Row",
    "add_errors",
    "markdown_table",
    "median_of",
    "number",
    "read_rows",
    "select",
    "versions",
    "write_rows",
]

Row = dict[str, Any]

COLUMNS = (
    *("model", "num_examples", "parameters", "batch_size", "library", "backend", "structure", "dtype"),
    *("repeat", "status", "value", "stderr", "error", "exact", "exact_from", "seconds", "gradient_seconds"),
    *("gradient_passes", "peak_mb", "prior_precision", "seed", "threads", "cores", "limit_seconds"),
    *("memory_limit_gb", "note", "python", "torch", "lightning-bayes", "laplace-torch", "curvlinops"),
    *("backpack", "asdl"),
)
PACKAGES = {
    "torch": "torch",
    "lightning-bayes": "lightning-bayes",
    "laplace-torch": "laplace-torch",
    "curvlinops": "curvlinops-for-pytorch",
    "backpack": "backpack-for-pytorch",
    "asdl": "asdfghjkl",
}
EXACT_SOURCES = (
    ("torch", "full", "float64"),
    ("lightning-bayes", "full", "float64"),
    ("lightning-bayes", "full", "float32"),
    ("lightning-bayes", "lanczos", "float32"),
)
"""Where the exact number is taken from, the best first; the last one has a standard error."""


def versions() -> Row:
    """Of everything that has a part in the numbers."""
    found: Row = {"python": platform.python_version(), "cores": os.cpu_count()}
    for column, package in PACKAGES.items():
        try:
            found[column] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[column] = ""
    return found


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> None:
    """All rows, rounded to what they mean."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _shown(value) for name, value in row.items()})


def _shown(value: object) -> object:
    return f"{value:.10g}" if isinstance(value, float) else value


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others, which are numbers, to the right."""
    every = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) + "\n"


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Rows whose columns have the given values."""
    return [
        row for row in rows if all(str(row.get(name, "")) == str(value) for name, value in wanted.items())
    ]


def number(row: Row, column: str) -> float:
    """A column as a number, NaN where there is none."""
    value = row.get(column, "")
    return math.nan if value in ("", None) else float(value)


def median_of(
    rows: Iterable[Row], column: str, summary: Callable[[list[float]], float] = statistics.median
) -> float:
    """Over the repeats that gave a number; NaN if none did."""
    values = [value for row in rows if not math.isnan(value := number(row, column))]
    return summary(values) if values else math.nan


def add_errors(rows: list[Row]) -> list[Row]:
    """Error of each value against the exact number of its model, in nats."""
    for model in dict.fromkeys(row["model"] for row in rows):
        exact, source = _exact(select(rows, model=model))
        for row in select(rows, model=model):
            value = number(row, "value")
            row["exact"], row["exact_from"] = ("" if math.isnan(exact) else exact), source
            row["error"] = "" if math.isnan(exact) or math.isnan(value) else value - exact
    return rows


def _exact(rows: list[Row]) -> tuple[float, str]:
    for library, structure, dtype in EXACT_SOURCES:
        found = median_of(select(rows, library=library, structure=structure, dtype=dtype), "value")
        if not math.isnan(found):
            return found, f"{library} {structure} {dtype}"
    return math.nan, "none"

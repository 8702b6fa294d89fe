"""A CSV file that grows by one measurement at a time, and knows which it has."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from examples.smith_le_2018.data import Unavailable

__all__ = ["Row", "Table", "complete_seeds"]

Job = TypeVar("Job")

Row = dict[str, str | int | float]


class Table:
    """Rows on disk, each written as soon as it is known.

    Numbers are written with all their digits, so that they come back the same.

    Args:
        path: of the CSV file; made, with its folder, at the first row.
        columns: column name to the type of its values, settings and results alike.
        key: the columns that name a row: its settings. A row is never written twice.

    Raises:
        ValueError: if the file has other columns.
    """

    def __init__(self, path: Path, columns: Mapping[str, type], key: Sequence[str]) -> None:
        self.path = path
        self.columns = dict(columns)
        self.key = tuple(key)
        self.rows: list[Row] = []
        self._known: dict[tuple[object, ...], Row] = {}
        self._whole: str | None = None
        if path.exists():
            self._read()

    def find(self, settings: Mapping[str, object]) -> Row | None:
        """The row of these settings, None if there is none yet."""
        return self._known.get(tuple(settings[name] for name in self.key))

    def append(self, row: Row) -> None:
        """Keep a row, and write it to the file at once."""
        if self.find(row) is not None:
            return
        self._keep(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._whole is not None:
            self.path.write_text(self._whole, encoding="utf-8")
            self._whole = None
        new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(self.columns)
            writer.writerow(row[name] for name in self.columns)

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        self._known[tuple(row[name] for name in self.key)] = row

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            # A run that was killed while it wrote: its last line is not whole, and goes with the next row. Who only
            # reads leaves the file alone, to which another process may be writing.
            text = self._whole = text[: text.rfind("\n") + 1]
        if not text:
            return
        header, *lines = csv.reader(text.splitlines())
        if header != list(self.columns):
            raise ValueError(
                f"Expected {self.path} to have the columns {list(self.columns)}, but got {header}. It was written by"
                " another version: move it away."
            )
        for number, line in enumerate(lines, 2):
            try:
                values = zip(self.columns.items(), line, strict=True)
                row: Row = {name: kind(value) for (name, kind), value in values}
            except ValueError as error:
                raise ValueError(
                    f"Expected line {number} of {self.path} to have a value for each of {list(self.columns)}, but got"
                    f" {line}. Delete the line: its run is done again."
                ) from error
            self._keep(row)


def complete_seeds(
    by_seed: Mapping[int, Sequence[Job]], done: Callable[[Job], bool], path: Path, name: str
) -> list[int]:
    """The seeds of a figure that are all there.

    Args:
        by_seed: seed to what the figure shows of it.
        done: whether one of these is there.
        path: of the CSV file.
        name: of the figure.

    Returns:
        Seeds, in their order.

    Raises:
        Unavailable: if there is none.
    """
    complete = [seed for seed, wanted in by_seed.items() if all(map(done, wanted))]
    if not complete:
        raise Unavailable(
            f"Expected {path} to have all of {name} for one seed at least, but some are missing for every seed. Run"
            " it without `--draw-only`."
        )
    return complete

"""A CSV file that grows by one measurement at a time, and knows which it has."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Row", "Table"]

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
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
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
            # A run that was killed while it wrote: its last line is not whole.
            text = text[: text.rfind("\n") + 1]
            self.path.write_text(text, encoding="utf-8")
        header, *lines = list(csv.reader(text.splitlines())) or [[]]
        if header != list(self.columns):
            raise ValueError(
                f"Expected {self.path} to have the columns {list(self.columns)}, but got {header}. It was written by"
                " another version: move it away."
            )
        for line in lines:
            values = zip(self.columns.items(), line, strict=True)
            self._keep({name: kind(value) for (name, kind), value in values})

"""What the paper claims, what was measured here, and whether the two agree: one table for all figures."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

__all__ = ["Claim", "above", "contains", "insert_table", "write_claims"]


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        figure: name of the figure on the command line.
        claim: the paper's, in a sentence.
        quantity: what `estimate` is, with its unit.
        estimate: the number measured.
        low: lower end of its 95 % interval.
        high: upper end.
        expected: what the claim says of the number.
        verdict: "holds", "does not hold", or "not resolved", and where it matters why.
    """

    figure: str
    claim: str
    quantity: str
    estimate: float
    low: float
    high: float
    expected: str
    verdict: str


def contains(value: float, low: float, high: float, least: float, most: float) -> str:
    """Verdict on a number that should be `value`; an interval that is not within `least` to `most` is too wide."""
    if not low <= value <= high:
        return "does not hold"
    return "holds" if least <= low and high <= most else "not resolved"


def above(value: float, low: float, high: float) -> str:
    """Verdict on a number that should be above `value`."""
    if low > value:
        return "holds"
    return "does not hold" if high < value else "not resolved"


def write_claims(folder: Path, claims: Iterable[Claim], order: Iterable[str]) -> Path:
    """Write `claims.csv` and `claims.md`; rows of other figures that are there already stay.

    Args:
        folder: of the results.
        claims: of the figures just made; theirs replace older ones.
        order: names of all figures, in the order of the table.

    Returns:
        Path of the Markdown table.
    """
    new = list(claims)
    made = {claim.figure for claim in new}
    path = folder / "claims.csv"
    old = [claim for claim in _read(path) if claim.figure not in made]
    rank = {name: number for number, name in enumerate(order)}
    rows = sorted([*old, *new], key=lambda claim: rank.get(claim.figure, len(rank)))
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Claim))
        writer.writerows(map(astuple, rows))
    markdown = folder / "claims.md"
    markdown.write_text("\n".join(_markdown(rows)) + "\n", encoding="utf-8")
    return markdown


def insert_table(page: Path, preset: str, table: Path) -> None:
    """Put a table of claims into a page, between the comments that name the preset; a page without them stays.

    Args:
        page: a Markdown file with `<!-- claims: PRESET -->` and `<!-- end of claims: PRESET -->`.
        preset: whose claims they are.
        table: `claims.md`.
    """
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- claims: {preset} -->\n", f"<!-- end of claims: {preset} -->\n"
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if found and found_end:
        page.write_text(
            f"{before}{begin}\n{table.read_text(encoding='utf-8')}\n{end}{after}", encoding="utf-8"
        )


def _read(path: Path) -> list[Claim]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Claim(
                **{
                    key: float(value) if key in ("estimate", "low", "high") else value
                    for key, value in row.items()
                }
            )
            for row in csv.DictReader(file)
        ]


def _markdown(rows: list[Claim]) -> list[str]:
    lines = [
        "| figure | claim | measured | estimate | 95 % interval | expected | verdict |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for row in rows:
        interval = f"{_number(row.low)} to {_number(row.high)}"
        cells = [
            row.figure,
            row.claim,
            row.quantity,
            _number(row.estimate),
            interval,
            row.expected,
            row.verdict,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _number(value: float) -> str:
    return f"{value:,.4g}".replace("-", "−")

"""Scaling advice as a table for the terminal and as plain text, both readable in 80 columns."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_bayes.functional import AdamAdvice, AdamConfiguration, Advice, Configuration

WIDTH = 80
Column = tuple[str, Configuration | AdamConfiguration | None]


def advice_text(advice: Sequence[Advice | AdamAdvice]) -> str:
    """Returns the tables as plain text of 80 columns, without colour."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(advice_renderable(advice))
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines())


def advice_renderable(advice: Sequence[Advice | AdamAdvice]) -> RenderableType:
    """Returns one table per piece of advice, its equations below, then its caveats."""
    return Group(*(_section(piece) for piece in advice))


def _section(advice: Advice | AdamAdvice) -> RenderableType:
    parts: list[RenderableType] = [_table(advice)]
    for heading, lines in (("Why", _why(advice)), ("Caveats", advice.caveats)):
        if lines:
            parts.append(Text(heading, style="bold"))
            parts.append(_bullets(lines))
    return Padding(Group(*parts), (1, 0, 0, 0), expand=False)


def _bullets(lines: Sequence[str]) -> Table:
    grid = Table.grid(padding=(0, 1))
    for line in lines:
        # Text, not markup: square brackets in a message are no style.
        grid.add_row(Text(" -"), Text(line))
    return grid


def _why(advice: Advice | AdamAdvice) -> tuple[str, ...]:
    return (advice.equation, *(line for move in advice.moves for line in move.why))


def _table(advice: Advice | AdamAdvice) -> Table:
    title = f"Scaling advice for {advice.name}" if advice.name else "Scaling advice"
    columns = _columns(advice)
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for label, values in _rows([configuration for _, configuration in columns]):
        table.add_row(label, *values)
    return table


def _columns(advice: Advice | AdamAdvice) -> list[Column]:
    columns: list[Column] = [("present", advice.present), ("target,\nelse same", advice.unchanged)]
    many = len(advice.moves) > 1
    for move in advice.moves:
        new = "lr" if move.solved_for == "learning_rate" else "batch"
        suffix = f",\nnew {new}" if many else " rule"
        if isinstance(advice, AdamAdvice):
            columns.append((f"sqrt{suffix}", getattr(move, "advised", None)))
        else:
            columns.append((f"exact{suffix}", getattr(move, "exact", None)))
            columns.append((f"linear{suffix}", getattr(move, "linear", None)))
    return columns


def _rows(configurations: list[Configuration | AdamConfiguration | None]) -> list[tuple[str, list[str]]]:
    names = {"learning rate": "learning_rate", "batch size": "batch_size", "dataset size": "dataset_size"}
    if isinstance(configurations[0], AdamConfiguration):
        names |= {"betas": "betas", "eps": "eps", "lr/sqrt(batch)": "noise_scale"}
    else:
        names |= {"momentum": "momentum", "dampening": "dampening", "noise scale": "noise_scale"}
    rows = []
    for label, attribute in names.items():
        values = [getattr(configuration, attribute, None) for configuration in configurations]
        if attribute == "dampening" and not any(values):
            continue
        rows.append((label, [_cell(value) for value in values]))
    return rows


def _cell(value: float | tuple[float, ...] | None) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "\n".join(f"{part:.6g}" for part in value)
    return f"{value:.5g}" if value != int(value) or abs(value) >= 1e9 else str(int(value))

"""Scaling advice as a table for the terminal and as plain text, both readable in 80 columns."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_bayes.functional import (
    AdamAdvice,
    AdamConfiguration,
    Advice,
    Check,
    Comparison,
    Configuration,
)
from lightning_bayes.functional.advice.wording import shared_checks

WIDTH = 80
STATUS = {"fails": "FAILS", "not measured": "not measured", "ok": "ok"}
STYLE = {"fails": "red", "not measured": "yellow", "ok": "green"}
Column = tuple[str, Configuration | AdamConfiguration | None]


def advice_text(advice: Sequence[Advice | AdamAdvice], comparisons: Sequence[Comparison] = ()) -> str:
    """Returns answers, tables and checks as plain text of 80 columns, without colour."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(advice_renderable(advice, comparisons))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def advice_renderable(
    advice: Sequence[Advice | AdamAdvice], comparisons: Sequence[Comparison] = ()
) -> RenderableType:
    """Returns for each piece of advice the answer, a table, its checks and equations; then the comparisons."""
    sections = [_section(piece) for piece in advice]
    if comparisons:
        lines = [comparison.summary for comparison in comparisons]
        sections.append(_padded([Text("Beside the reference", style="bold"), _bullets(lines)]))
    return Group(*sections)


def _section(advice: Advice | AdamAdvice) -> RenderableType:
    title = f"Scaling advice for {advice.name}" if advice.name else "Scaling advice"
    parts: list[RenderableType] = [
        Text(title, style="italic"),
        # The largest move that no check fails, and below it what was asked for.
        Text(advice.summary.replace("; asked, ", "\nasked, "), style="bold"),
        _table(advice),
    ]
    sets = _check_sets(advice)
    for which, checks in sets:
        parts += _doubts(which, checks)
    parts += _list("Notes", advice.notes)
    for which, checks in sets:
        actions = [check.sentence for check in checks if check.action and not check.passed]
        parts += _list(f"With the move{which}", actions)
    return _padded([*parts, *_list("Why", _why(advice))])


def _check_sets(advice: Advice | AdamAdvice) -> list[tuple[str, list[Check]]]:
    """The checks that all moves share, and those of each with its name."""
    shared = shared_checks(advice.moves)
    sets = [("", list(shared))]
    for move in advice.moves:
        which = f", new {move.solved_for.replace('_', ' ')}" if len(advice.moves) > 1 else ""
        sets.append((which, [check for check in move.checks if check not in shared]))
    return sets


def _padded(parts: Sequence[RenderableType]) -> RenderableType:
    return Padding(Group(*parts), (1, 0, 0, 0), expand=False)


def _doubts(which: str, checks: Sequence[Check]) -> list[RenderableType]:
    """What does not pass in full, what passes in short."""
    validity = [check for check in checks if not check.action]
    lines = [(check.status, check.sentence) for check in validity if not check.passed]
    passed = [_passed(check) for check in validity if check.passed]
    if passed:
        lines.append(("ok", ", ".join(passed)))
    return [Text(f"How sure{which}", style="bold"), _labelled(lines)] if lines else []


def _passed(check: Check) -> str:
    """The name of a check, and by how much it passes."""
    name = check.name.replace("_", " ")
    if check.value is None or check.limit is None:
        return name
    if not math.isfinite(check.limit):
        return name  # no limit at all
    value, limit = (f"{x:.0f}" if 1e3 <= x < 1e9 else f"{x:.3g}" for x in (abs(check.value), check.limit))
    return f"{name} ({value} of {limit})"


def _list(heading: str, lines: Sequence[str]) -> list[RenderableType]:
    return [Text(heading, style="bold"), _bullets(lines)] if lines else []


def _labelled(lines: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(no_wrap=True)
    for label, line in lines:
        grid.add_row(Text(" -"), Text(STATUS[label], style=STYLE[label]), Text(line))
    return grid


def _bullets(lines: Sequence[str]) -> Table:
    grid = Table.grid(padding=(0, 1))
    for line in lines:
        # Text, not markup: square brackets in a message are no style.
        grid.add_row(Text(" -"), Text(line))
    return grid


def _why(advice: Advice | AdamAdvice) -> tuple[str, ...]:
    return (advice.equation, *(line for move in advice.moves for line in move.why))


def _table(advice: Advice | AdamAdvice) -> Table:
    columns = _columns(advice)
    table = Table()
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
            columns.append((f"linear{suffix}", getattr(move, "linear", None)))
        else:
            columns.append((f"exact{suffix}", getattr(move, "exact", None)))
            columns.append((f"linear{suffix}", getattr(move, "linear", None)))
    return columns


def _rows(configurations: list[Configuration | AdamConfiguration | None]) -> list[tuple[str, list[str]]]:
    names = {"learning rate": "learning_rate", "batch size": "batch_size", "dataset size": "dataset_size"}
    if isinstance(configurations[0], AdamConfiguration):
        names |= {"betas": "betas", "eps": "eps", "lr/sqrt(batch)": "noise_scale"}
    else:
        if configurations[0] is not None and configurations[0].reduction == "sum":
            names |= {"lr on the mean": "mean_learning_rate"}
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

"""Scaling advice as a table for the terminal, as plain text, both readable in 80 columns, and as flat keys."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from lightning_bayes.functional import Advice, Check, Comparison, SavedAdvice

WIDTH = 80
LABELS = {"fails": ("FAILS", "red"), "not measured": ("not measured", "yellow"), "ok": ("ok", "green")}
RULES = {"sgd": "exact", "adam": "sqrt"}
START = {"learning rate": "learning_rate", "batch size": "batch_size", "dataset size": "dataset_size"}
ROWS = {
    "sgd": {
        **START,
        "lr on the mean": "mean_learning_rate",
        "momentum": "momentum",
        "dampening": "dampening",
        "noise scale": "noise_scale",
    },
    "adam": {**START, "betas": "betas", "eps": "eps", "lr/sqrt(batch)": "noise_scale"},
}


def advice_text(advice: Sequence[Advice[Any]], comparisons: Sequence[Comparison] = ()) -> str:
    """Returns answers, tables and checks as plain text of 80 columns, without colour."""
    file = io.StringIO()
    console = Console(file=file, width=WIDTH, color_system=None, legacy_windows=False)
    console.print(advice_renderable(advice, comparisons))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")


def advice_renderable(
    advice: Sequence[Advice[Any]], comparisons: Sequence[Comparison] = ()
) -> RenderableType:
    """Returns for each piece of advice the answer, a table, its checks and equations; then the comparisons."""
    sections = [_section(piece) for piece in advice]
    if comparisons:
        sections.append(_listed("Beside the reference", [comparison.summary for comparison in comparisons]))
    return Group(*(Padding(Group(*parts), (1, 0, 0, 0), expand=False) for parts in sections))


def _section(advice: Advice[Any]) -> list[RenderableType]:
    summary = advice.summary
    sets = [(f", {which}" if which else "", checks) for which, checks in advice.checks_by_move()]
    parts: list[RenderableType] = [
        Text(f"Scaling advice for {advice.name}" if advice.name else "Scaling advice", style="italic"),
        # The largest move that no check fails, and below it what was asked for.
        Text(summary.replace("; asked, ", "\nasked, "), style="bold"),
        _table(advice),
    ]
    for which, checks in sets:
        parts += _doubts(f"How sure{which}", [check for check in checks if not check.action])
    parts += _listed("Notes", advice.notes)
    for which, checks in sets:
        actions = [check.sentence for check in checks if check.action and not check.passed]
        parts += _listed(f"With the move{which}", actions)
    return parts + _listed("Why", [advice.equation, *(line for move in advice.moves for line in move.why)])


def _table(advice: Advice[Any]) -> Table:
    """The configurations side by side."""
    columns = {"present": advice.present, "target,\nelse same": advice.unchanged}
    for move in advice.moves:
        suffix = " rule"
        if len(advice.moves) > 1:
            suffix = ",\nnew lr" if move.solved_for == "learning_rate" else ",\nnew batch"
        columns |= {
            f"{RULES[advice.present.optimizer]}{suffix}": move.advised,
            f"linear{suffix}": move.linear,
        }
    table = Table(Column("", no_wrap=True), *(Column(heading, justify="right") for heading in columns))
    for label, name in ROWS[advice.present.optimizer].items():
        values = [getattr(configuration, name, None) for configuration in columns.values()]
        of_a_mean = name == "mean_learning_rate" and advice.present.reduction == "mean"
        if not of_a_mean and (name != "dampening" or any(values)):
            table.add_row(label, *map(_cell, values))
    return table


def _cell(value: float | tuple[float, ...] | None) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "\n".join(f"{part:.6g}" for part in value)
    return f"{value:.5g}" if value != int(value) or abs(value) >= 1e9 else str(int(value))


def _doubts(heading: str, checks: Sequence[Check]) -> list[RenderableType]:
    """What does not pass in full, what passes in short."""
    rows = [(check.status, check.sentence) for check in checks if not check.passed]
    if passed := [_passed(check) for check in checks if check.passed]:
        rows.append(("ok", ", ".join(passed)))
    return _listed(heading, [line for _, line in rows], [LABELS[status] for status, _ in rows])


def _passed(check: Check) -> str:
    """The name of a check, and by how much it passes."""
    name = check.name.replace("_", " ")
    if check.value is None or check.limit is None or not math.isfinite(check.limit):
        return name
    value, limit = (f"{x:.0f}" if 1e3 <= x < 1e9 else f"{x:.3g}" for x in (abs(check.value), check.limit))
    return f"{name} ({value} of {limit})"


def _listed(
    heading: str, lines: Sequence[str], labels: Sequence[tuple[str, str]] = ()
) -> list[RenderableType]:
    """A heading over lines with a dash, and labels of a style before them; nothing where there are no lines."""
    if not lines:
        return []
    grid = Table.grid(*(Column(no_wrap=True) for _ in ("dash", *labels[:1])), Column(), padding=(0, 1))
    for index, line in enumerate(lines):
        # Text, not markup: square brackets in a message are no style.
        grid.add_row(" -", *(Text(*label) for label in labels[index : index + 1]), Text(line))
    return [Text(heading, style="bold"), grid]


def flat_keys(saved: SavedAdvice, prefix: str) -> dict[str, float | str]:
    """Advice as flat keys: present and advised values, verdict and summary, by parameter groups.

    Args:
        saved: the advice.
        prefix: such as "bayes/advice".

    Returns:
        Such as {"bayes/advice/SGD/present/learning_rate": 0.1, ...}.
    """
    flat: dict[str, float | str] = {}
    for advice in saved.advice:
        start = f"{prefix}/{_key(advice.name)}"
        flat |= {f"{start}/summary": advice.summary, f"{start}/verdict": advice.verdict}
        scale = "noise_scale" if advice.present.optimizer == "sgd" else "adam_noise_scale"
        cases = {"present": advice.present}
        cases |= {f"advised_{move.solved_for}": move.advised for move in advice.moves if move.advised}
        for case, configuration in cases.items():
            flat[f"{start}/{case}/learning_rate"] = configuration.learning_rate
            flat[f"{start}/{case}/batch_size"] = configuration.batch_size
            flat[f"{start}/{case}/{scale}"] = configuration.noise_scale
    for comparison in saved.comparisons:
        start = f"{prefix}/{_key(comparison.name)}"
        flat[f"{start}/reference_noise_scale"] = comparison.reference_noise_scale
        flat[f"{start}/reference_ratio"] = comparison.ratio
    return flat


def _key(name: str) -> str:
    return name.replace(", ", " ")  # MLflow takes no commas

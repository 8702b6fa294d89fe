"""The results as Markdown tables, for the docs."""

import math
from pathlib import Path

from summary import candidates, of_candidate
from table import Row, median_of, number, select

__all__ = ["write_markdown"]

LONGEST_STATUS = 60


def write_markdown(rows: list[Row], path: Path) -> None:
    """One table a model, every number from `rows`."""
    parts = [_section(model, select(rows, model=model)) for model in dict.fromkeys(r["model"] for r in rows)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _section(model: str, rows: list[Row]) -> str:
    known = next((row for row in rows if row["parameters"]), rows[0])
    repeats = 1 + max(int(row["repeat"]) for row in rows)
    exact = number(known, "exact")
    about = "no exact number" if math.isnan(exact) else f"exact {exact:,.2f} nats ({known['exact_from']})"
    lines = [
        f"## {model}",
        "",
        f"{known['num_examples']} examples in batches of {known['batch_size']}, {known['parameters']} parameters, "
        f"λ = {known['prior_precision']}, seed {known['seed']}, {known['threads']} threads, float32, {repeats} "
        f"repeats (medians), {known['limit_seconds']} s at most; {about}.",
        "",
        "| candidate | value, nats | error | gradient passes | memory, MB |",
        "|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *(_line(candidate, rows) for candidate in candidates(rows))])


def _line(candidate: tuple[str, str, str], rows: list[Row]) -> str:
    runs = of_candidate(rows, candidate)
    name = " ".join(filter(None, candidate))
    value = median_of(runs, "value")
    passes = median_of(runs, "gradient_passes")
    if math.isnan(passes):
        status = runs[0]["status"].replace("|", "/").splitlines()[0] if runs else "not run"
        shown = status if len(status) <= LONGEST_STATUS else f"{status[:LONGEST_STATUS]}…"
        return f"| {name} | {shown} | | | |"
    numbers = [value, median_of(runs, "error"), passes, median_of(runs, "peak_mb", max)]
    forms = ["{:,.2f}", "{:+,.2f}", "{:,.1f}", "{:,.0f}"]
    cells = ["" if math.isnan(n) else form.format(n) for n, form in zip(numbers, forms, strict=True)]
    return f"| {name} | {' | '.join(cells)} |"

"""Prints the results: one table a model, and the ratios that the package promises."""

import math

from rich.console import Console
from rich.table import Table
from table import Row, median_of, number, select

__all__ = ["print_summary"]

EQUAL = 1e-6
"""Relative difference of two float64 values that counts as the same number."""


def print_summary(rows: list[Row]) -> None:
    """All tables."""
    console = Console(width=150)
    for model in dict.fromkeys(row["model"] for row in rows):
        console.print(_table(model, select(rows, model=model)))
    console.print(_ratios(rows))


def candidates(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Library, backend and structure of each candidate, in the order of the rows."""
    return list(dict.fromkeys((row["library"], row["backend"], row["structure"]) for row in rows))


def of_candidate(rows: list[Row], candidate: tuple[str, str, str], dtype: str = "float32") -> list[Row]:
    """The runs of one candidate."""
    library, backend, structure = candidate
    return select(rows, library=library, backend=backend, structure=structure, dtype=dtype)


def _table(model: str, rows: list[Row]) -> Table:
    first = rows[0]
    title = f"{model}: {first['num_examples']} examples, {first['parameters']} parameters"
    exact = number(first, "exact")
    if not math.isnan(exact):
        title += f"; exact {exact:,.4f} nats ({first['exact_from']})"
    table = Table(title=title, title_justify="left")
    table.add_column("candidate")
    for name in ("error, nats", "in float64", "gradient passes", "seconds", "memory, MB"):
        table.add_column(name, justify="right")
    table.add_column("status", max_width=60)
    for candidate in candidates(rows):
        runs = of_candidate(rows, candidate)
        twin = of_candidate(rows, candidate, "float64")
        shown = [
            _number(median_of(runs, "error"), "+,.4f"),
            _number(median_of(twin, "error"), "+,.6f"),
            _number(median_of(runs, "gradient_passes"), ",.1f"),
            _number(median_of(runs, "seconds"), ",.3f"),
            _number(median_of(runs, "peak_mb", max), ",.0f"),
        ]
        table.add_row(" ".join(filter(None, candidate)), *shown, runs[0]["status"] if runs else "not run")
    return table


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _ratios(rows: list[Row]) -> Table:
    table = Table(
        title="Ratios of median times, each in gradient passes of its own process", title_justify="left"
    )
    for name in ("what", "model", "found", "target"):
        table.add_column(name)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = select(rows, model=model)
        exact = _time(own, ("lightning-bayes", "", "full"))
        floor = _time(own, ("torch", "", "GEMM + Cholesky"))
        _add(table, "exact / (GEMM + Cholesky)", model, exact / floor, "<= 1.5")
        for tolerance, target in (("1", 0.4), ("10", 0.15)):
            bracket = _time(own, ("lightning-bayes", "", f"tolerance {tolerance}"))
            _add(table, f"tolerance {tolerance} / exact", model, bracket / exact, f"<= {target}")
        for structure, faster, passes in (("kron", 3, 14), ("diag", 4, 8), ("full", 1, None)):
            ours = ("lightning-bayes", "", structure)
            peers = [peer for peer in candidates(own) if peer[0] != ours[0] and _same_number(own, ours, peer)]
            for group in ("laplace-torch", "any peer"):
                times = [_time(own, peer) for peer in peers if group in (peer[0], "any peer")]
                if times:
                    ratio = min(times) / _time(own, ours)
                    target = f">= {faster if group == 'laplace-torch' else 1}"
                    _add(table, f"{structure}: fastest of {group}, same number / ours", model, ratio, target)
            alike = _time(own, ("torch", "", "full, all fields"))
            if structure == "full":
                _add(
                    table,
                    "full: dense torch with the same fields / ours",
                    model,
                    alike / _time(own, ours),
                    ">= 1",
                )
            if passes:
                needed = median_of(of_candidate(own, ours), "gradient_passes")
                _add(table, f"{structure}: gradient passes", model, needed, f"<= {passes}")
    return table


def _add(table: Table, what: str, model: str, found: float, target: str) -> None:
    if not math.isnan(found):
        sign, bound = target.split()
        met = found <= float(bound) if sign == "<=" else found >= float(bound)
        table.add_row(what, model, f"{found:.2f}", f"{target}{'' if met else '  MISSED'}")


def _time(rows: list[Row], candidate: tuple[str, str, str]) -> float:
    """In gradient passes: what else the machine does slows both alike."""
    return median_of(of_candidate(rows, candidate), "gradient_passes")


def _same_number(rows: list[Row], ours: tuple[str, str, str], peer: tuple[str, str, str]) -> bool:
    """Whether a peer that runs in float32 gives our value where rounding does not blur it, in float64."""
    if math.isnan(_time(rows, peer)):
        return False
    values = [median_of(of_candidate(rows, candidate, "float64"), "value") for candidate in (ours, peer)]
    if any(map(math.isnan, values)):  # without float64 the digits of float32 must do
        values = [median_of(of_candidate(rows, candidate), "value") for candidate in (ours, peer)]
        return math.isclose(*values, rel_tol=1e-4)
    return math.isclose(*values, rel_tol=EQUAL)

"""How all figures look: readable at the width of a README, on white, so that a dark page shows them as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

__all__ = ["band", "batch_axis", "colours", "figure", "log_axis"]

STYLE = {
    "font.size": 10,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # White, so that names stay readable over curves.
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 140,
}


@contextmanager
def figure(
    path: Path, columns: int = 2, width: float = 8.4, height: float = 3.5, rows: int = 1
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Panels row by row; written to `path` at the end."""
    with plt.rc_context(STYLE):
        made, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
        yield made, list(axes.flat)
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path)
        plt.close(made)


def colours(count: int) -> list[tuple[float, ...]]:
    """From dark to light in the order of a quantity, all visible on white."""
    return [plt.get_cmap("viridis")(at) for at in np.linspace(0, 0.88, count)]


def band(axis: Axes, x: np.ndarray, values: np.ndarray, *, marker: str = "o", **style: object) -> None:
    """Mean over seeds with its standard error as a bar.

    Args:
        axis: to draw on.
        x: [k].
        values: [seeds, k].
        marker: of the means.
        style: for `errorbar`.
    """
    seeds = len(values)
    error = values.std(0, ddof=1) / np.sqrt(seeds) if seeds > 1 else None
    axis.errorbar(x, values.mean(0), yerr=error, marker=marker, capsize=2, linewidth=1.3, **style)


def log_axis(axis: Axes, which: str = "x", ticks: list[float] | None = None) -> None:
    """Logarithmic, with plain numbers at its ticks."""
    getattr(axis, f"set_{which}scale")("log")
    one = getattr(axis, f"{which}axis")
    one.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=(1.0, 3.0)))
    one.set_minor_locator(NullLocator())
    one.set_major_formatter(StrMethodFormatter("{x:,g}"))


def batch_axis(axis: Axes) -> None:
    """The x axis of a sweep over batch sizes."""
    log_axis(axis)
    axis.set_xlabel("batch size B (examples)")

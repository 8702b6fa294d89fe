"""Figures 5, 6 and 7 in one form: accuracy against batch size, and the best batch size against something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from examples.smith_le_2018.claims import Claim, contains
from examples.smith_le_2018.peak import PowerLaw, power_law
from examples.smith_le_2018.plotting import band, batch_axis, colours, figure, log_axis

__all__ = ["Sweep", "draw", "slope_claim"]


TOLD_APART = (0.5, 1.5)
"""Exponents that an interval must not reach: one that does says neither "proportional" nor anything else."""


@dataclass(frozen=True)
class Sweep:
    """Accuracies over batch sizes for each value of something.

    Attributes:
        x: [k], what the best batch size should be proportional to.
        grids: for each x its batch sizes [b] and test accuracies [seeds, b].
        labels: of each x in the legend.
        fitted: how many of the first x the slope is fitted to.
    """

    x: Sequence[float]
    grids: Sequence[tuple[Sequence[int], np.ndarray]]
    labels: Sequence[str]
    fitted: int | None = None

    def from_x(self, least: float) -> Sweep:
        """The part with x of at least so much."""
        first = next(place for place, value in enumerate(self.x) if value >= least)
        return Sweep(self.x[first:], self.grids[first:], self.labels[first:])

    def at_the_edge(self) -> list[str]:
        """Labels of the fitted x whose best batch size is the first or the last of its grid."""
        fitted = list(zip(self.labels, self.grids, strict=True))[: self.fitted]
        return [label for label, (_, found) in fitted if found.mean(0).argmax() in (0, found.shape[1] - 1)]

    def law(self) -> PowerLaw:
        """The exponent over the x that are fitted."""
        return power_law(self.x[: self.fitted], self.grids[: self.fitted])


def draw(path: Path, sweep: Sweep, name: str, *, accuracy_floor: Callable[[float], float]) -> None:
    """Write the figure.

    Args:
        path: of the PNG file.
        sweep: what to show.
        name: of x on its axis.
        accuracy_floor: the best accuracy to the least that is shown; runs that did not train fall below.
    """
    with figure(path) as (_, (left, right)):
        best = max(found.mean(0).max() for _, found in sweep.grids)
        for (sizes, found), label, colour in zip(
            sweep.grids, sweep.labels, colours(len(sweep.x)), strict=True
        ):
            highest = found.mean(0).max()
            unseen = f", at most {highest:.2f}" if highest < accuracy_floor(best) else ""
            band(left, np.array(sizes), found, color=colour, label=label + unseen)
        left.set_ylim(accuracy_floor(best), best + 0.1 * (best - accuracy_floor(best)))
        left.set_ylabel("test accuracy")
        batch_axis(left)
        left.legend(
            fontsize=8,
            ncols=2 if len(sweep.x) > 4 else 1,
            loc="lower right",
            handlelength=1.2,
            columnspacing=0.8,
        )
        _draw_law(right, sweep, name)


def _draw_law(axis: Axes, sweep: Sweep, name: str) -> None:
    law = sweep.law()
    x = np.array(sweep.x, dtype=float)[: sweep.fitted]
    known = np.isfinite(law.high)
    spread = np.abs(np.array([law.best_low, law.best_high]) - law.best) if known else None
    name_of_points = "best batch, 95 % interval" if known else "best batch, one seed"
    axis.errorbar(x, law.best, yerr=spread, fmt="o", color="#1f4fd8", capsize=3, label=name_of_points)
    label = f"slope {law.slope:.2f}" + (f", 95 % {law.low:.2f} to {law.high:.2f}" if known else "")
    axis.plot(x, law.at(x), color="#1f4fd8", linewidth=1.3, label=label)
    middle = np.exp(np.log(x).mean()), np.exp(np.log(law.best).mean())
    axis.plot(
        x,
        middle[1] * x / middle[0],
        color="#888888",
        linestyle="--",
        linewidth=1.2,
        label="slope 1, the paper's",
    )
    log_axis(axis, "x")
    log_axis(axis, "y")
    # The intervals of two or three seeds reach over decades: they leave the axes.
    bottom, top = axis.get_ylim()
    axis.set_ylim(max(bottom, law.best.min() / 4), min(top, law.best.max() * 8))
    axis.set(xlabel=name, ylabel="best batch size (examples)")
    axis.legend(fontsize=8, loc="upper left")


def slope_claim(figure_name: str, claim: str, against: str, sweep: Sweep) -> Claim:
    """The row of the table: the paper's exponent is 1, which a peak outside its grid cannot speak for."""
    law, edge = sweep.law(), sweep.at_the_edge()
    verdict = contains(1.0, law.low, law.high, *TOLD_APART)
    if edge:
        verdict = f"not resolved: the best batch is at the edge of the grid for {' and '.join(edge)}"
    quantity = f"slope of log best B against log {against}"
    expected = "1, told apart from {:g} and {:g}".format(*TOLD_APART)
    return Claim(figure_name, claim, quantity, law.slope, law.low, law.high, expected, verdict)

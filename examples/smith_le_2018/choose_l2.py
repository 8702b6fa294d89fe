"""(b) Which evidence picks the L2 of the least test cross-entropy for the net: exact, Kronecker or diagonal?"""

from __future__ import annotations

import numpy as np

from examples.smith_le_2018.claims import Claim
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.intervals import (
    best_place,
    bootstrap,
    chosen_cost,
    mean_interval,
    optima_agree,
    rank_correlation,
    within,
)
from examples.smith_le_2018.plotting import band, figure, log_axis
from examples.smith_le_2018.settled import NETS, STRUCTURES, NetSettings
from examples.smith_le_2018.trials import Trials

__all__ = ["choose_l2"]

COLUMNS = {structure: f"{structure}_log_evidence_ratio" for structure in STRUCTURES} | {
    "full": "log_evidence_ratio"
}
NAMES = {"full": "exact", "kron": "kron", "diag": "diag"}
COLOURS = {"full": "#1f4fd8", "kron": "#e07b00", "diag": "#a3195b"}
MARKERS = {"full": "o", "kron": "s", "diag": "^"}
DECADES = 0.5
"""Within which the best λ by evidence should lie of the best by test cross-entropy: half a decade is one place of the
paper preset's grid."""
NEGLIGIBLE = 0.01
"""Nats of test cross-entropy per example that a choice may cost."""
CLAIM = "(b) Evidence picks the L2 of the least test cross-entropy"


def choose_l2(context: Context) -> list[Claim]:
    """Nets settled at every λ: evidence by three structures, and test cross-entropy."""
    preset = context.preset.evidence
    trials, precisions = Trials(NETS, context), preset.net_precisions

    def settings(precision: float, seed: int) -> NetSettings:
        return NetSettings(preset.net_examples, preset.net_hidden, "true", precision, seed)

    seeds = trials.measure("l2", lambda seed: [settings(one, seed) for one in precisions], preset.net_seeds)
    loss = trials.grid("test_loss", settings, seeds, precisions)
    decrement = trials.grid("newton_decrement", settings, seeds, precisions)
    ratios = {name: trials.grid(column, settings, seeds, precisions) for name, column in COLUMNS.items()}
    x = np.array(precisions)
    with figure(context.folder / "l2.png", width=9.0, height=3.7) as (made, (left, right)):
        best = x[loss.mean(0).argmin()]
        for name, ratio in ratios.items():
            label = f"{NAMES[name]}, best at λ = {x[ratio.mean(0).argmax()]:g}"
            band(left, x, ratio, marker=MARKERS[name], color=COLOURS[name], label=label)
        left.set_ylabel("log evidence ratio (nats)")
        # diag falls out of every scale at weak L2
        span = np.concatenate(
            [ratios["full"].mean(0), ratios["kron"].mean(0), [ratios["diag"].mean(0).max()]]
        )
        left.set_ylim(span.min() - 0.1 * np.ptp(span), span.max() + 0.1 * np.ptp(span))
        band(right, x, loss, color="#444444", label=f"best at λ = {best:g}")
        right.set_ylabel("test cross-entropy (nats per example)")
        for axis in (left, right):
            axis.axvline(best, color="#888888", linestyle="--", linewidth=1)
            log_axis(axis, "x", [value for value in (0.01, 0.1, 1, 10, 100) if x[0] <= value <= x[-1]])
            axis.set_xlabel("L2: prior precision λ = N · weight decay")
        made.legend(*left.get_legend_handles_labels(), fontsize=9, ncols=3, loc="outside lower left")
        right.legend(fontsize=9)
    return [
        claim for name, ratio in ratios.items() for claim in _claims(name, x, ratio, loss, decrement.max())
    ]


def _claims(name: str, x: np.ndarray, ratio: np.ndarray, loss: np.ndarray, decrement: float) -> list[Claim]:
    def decades(draw: np.ndarray) -> float:
        return best_place(x, -ratio[draw].mean(0)) - best_place(x, loss[draw].mean(0))

    def correlation(draw: np.ndarray) -> float:
        return rank_correlation(-ratio[draw].mean(0), loss[draw].mean(0))

    costs = chosen_cost(-ratio, loss)
    distance, rank = bootstrap(decades, len(loss)), bootstrap(correlation, len(loss), most=1.0)
    cost = mean_interval(costs)
    settled = f"; Newton decrements at most {decrement:.2g} nats" if name == "full" else ""
    return [
        Claim(
            "l2",
            f"{CLAIM}: {NAMES[name]}",
            f"log10 (best λ by evidence / best λ by test cross-entropy){settled}",
            *distance,
            f"within ±{DECADES:g}",
            optima_agree(DECADES, *distance[1:], -ratio.mean(0), loss.mean(0)),
        ),
        Claim(
            "l2",
            f"{CLAIM}: {NAMES[name]}",
            "test cross-entropy at the λ that the evidence of the same seed picks, less the least (nats per example)",
            *cost,
            f"< {NEGLIGIBLE:g}",
            within(NEGLIGIBLE, *cost[1:]),
        ),
        Claim(
            "l2",
            f"{CLAIM}: {NAMES[name]}",
            f"rank correlation of −log evidence ratio and test cross-entropy over {len(x)} λ",
            *rank,
            "reported",
            "reported",
        ),
    ]

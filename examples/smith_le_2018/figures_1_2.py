"""Figures 1 and 2: L2 against accuracy, test cross-entropy and evidence of a logistic regression, two labellings."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from examples.smith_le_2018.claims import Claim, above
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.intervals import (
    best_place,
    bootstrap,
    mean_interval,
    optima_agree,
    rank_correlation,
    within,
)
from examples.smith_le_2018.logistic import CONVERGED, LOGISTIC, LogisticSettings
from examples.smith_le_2018.plotting import band, figure, log_axis
from examples.smith_le_2018.trials import Trials

__all__ = ["figure_1", "figure_2"]

TASKS = ("true", "random")
COLOURS = {"true": "#1f4fd8", "random": "#e07b00"}
CORRELATED = 0.9
DECADES = 1.0
FAVOURED = 1.0
"""Nats by which no random labelling may be favoured."""
AGREEMENT = 1e-3
"""Nats between a Lightning run and the fit."""


class _Curves:
    """What was measured over λ: arrays [seeds, λ] by labelling and column."""

    def __init__(self, context: Context, name: str) -> None:
        self.preset = context.preset.evidence
        self.trials = Trials(LOGISTIC, context)
        self.seeds = self.trials.measure(name, self._wanted, self.preset.logistic_seeds)
        decrement = np.concatenate([self.of("newton_decrement", task) for task in TASKS])
        # A λ counts only where the optimiser has converged for every draw and both labellings.
        self.converged = (decrement < CONVERGED).all(0)
        self.precisions = np.array(self.preset.logistic_precisions)[self.converged]
        if not self.converged.any():
            raise ValueError(
                f"Expected fits with a Newton decrement below {CONVERGED} nats, but no λ has them."
            )

    def _wanted(self, seed: int) -> list[LogisticSettings]:
        wanted = [
            self._settings(task, precision, "newton", seed)
            for task in TASKS
            for precision in self.preset.logistic_precisions
        ]
        return [*wanted, self._settings("true", self.preset.lightning_precision, "lightning", seed)]

    def _settings(self, task: str, precision: float, by: str, seed: int) -> LogisticSettings:
        return LogisticSettings(self.preset.logistic_examples, task, precision, by, seed)

    def of(self, column: str, task: str) -> np.ndarray:
        """[seeds, λ], whether converged or not."""
        return self.trials.grid(
            column,
            lambda precision, seed: self._settings(task, precision, "newton", seed),
            self.seeds,
            self.preset.logistic_precisions,
        )

    def settled(self, column: str, task: str) -> np.ndarray:
        """[seeds, λ], where converged."""
        return self.of(column, task)[:, self.converged]

    def lightning(self, column: str) -> np.ndarray:
        """[seeds], of the Lightning runs less that of the fit."""
        of = [
            self.trials.grid(
                column,
                lambda precision, seed, by=by: self._settings("true", precision, by, seed),  # type: ignore[misc]
                self.seeds,
                [self.preset.lightning_precision],
            )[:, 0]
            for by in ("lightning", "newton")
        ]
        return of[0] - of[1]


def figure_1(context: Context) -> list[Claim]:
    """Training and test accuracy against λ."""
    curves = _Curves(context, "fig1")
    with figure(context.folder / "fig1.png") as (_, axes):
        for axis, task in zip(axes, TASKS, strict=True):
            for column, marker, style in (("train_accuracy", "o", "-"), ("test_accuracy", "s", "--")):
                band(
                    axis,
                    curves.precisions,
                    curves.settled(column, task),
                    marker=marker,
                    linestyle=style,
                    color=COLOURS[task],
                    alpha=1.0 if column == "train_accuracy" else 0.65,
                    label=column.replace("_", " ").replace("train ", "training "),
                )
            _precision_axis(axis)
            axis.set(ylim=(0.45, 1.02), ylabel="accuracy", title=f"{task} labels")
            axis.legend(loc="center left" if task == "true" else "upper right", fontsize=9)
    weakest = {(c, t): curves.settled(c, t)[:, 0] for c in ("train_accuracy", "test_accuracy") for t in TASKS}
    where = f"λ = {curves.precisions[0]:g}"
    return [
        _accuracy(weakest["train_accuracy", "true"], f"training accuracy, true labels, {where}", 0.95),
        _accuracy(weakest["train_accuracy", "random"], f"training accuracy, random labels, {where}", 0.9),
        _accuracy(weakest["test_accuracy", "true"], f"test accuracy, true labels, {where}", 0.95),
        _guessing(weakest["test_accuracy", "random"], f"test accuracy, random labels, {where}"),
    ]


def figure_2(context: Context) -> list[Claim]:
    """Test cross-entropy and log evidence ratio against λ."""
    curves = _Curves(context, "fig2")
    with figure(context.folder / "fig2.png", width=9.0) as (_, axes):
        for axis, task in zip(axes, TASKS, strict=True):
            _two_curves(axis, curves, task)
    return [
        *_true_label_claims(curves),
        *_random_label_claims(curves),
        _lightning_claim(curves),
    ]


def _two_curves(axis: Axes, curves: _Curves, task: str) -> None:
    """Test cross-entropy on the left axis, the log evidence ratio on the right one."""
    loss, ratio = curves.settled("test_loss", task), curves.settled("log_evidence_ratio", task)
    band(
        axis, curves.precisions, loss, color="#444444", marker="s", linestyle="--", label="test cross-entropy"
    )
    log_axis(axis, "y", [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30])
    axis.set(ylabel="test cross-entropy (nats per example)", title=f"{task} labels")
    other = axis.twinx()
    band(other, curves.precisions, ratio, color=COLOURS[task], label="log evidence ratio")
    other.axhline(0, color=COLOURS[task], linewidth=0.8, linestyle=":")
    other.grid(visible=False)
    other.spines["right"].set_visible(True)
    other.set_ylabel("log evidence ratio (nats)", color=COLOURS[task])
    other.tick_params(axis="y", colors=COLOURS[task])
    _precision_axis(axis)
    handles = [*axis.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    axis.legend(handles=handles, fontsize=9, loc="center left" if task == "true" else "center right")


def _precision_axis(axis: Axes) -> None:
    log_axis(axis, "x", [1e-4, 1e-2, 1, 100, 1e4])
    axis.set_xlabel("L2: prior precision λ")


def _accuracy(values: np.ndarray, quantity: str, least: float) -> Claim:
    mean, low, high = mean_interval(values)
    claim = "1. Both tasks are (nearly) memorised, only true labels generalise"
    return Claim("fig1", claim, quantity, mean, low, high, f"> {least:g}", above(least, low, high))


def _guessing(values: np.ndarray, quantity: str) -> Claim:
    mean, low, high = mean_interval(values)
    claim = "1. Both tasks are (nearly) memorised, only true labels generalise"
    return Claim("fig1", claim, quantity, mean, low, high, "0.5 ± 0.05", within(0.05, low, high, 0.5))


def _true_label_claims(curves: _Curves) -> list[Claim]:
    loss, ratio = (curves.settled(column, "true") for column in ("test_loss", "log_evidence_ratio"))
    seeds, precisions = len(curves.seeds), curves.precisions
    correlation = bootstrap(
        lambda draw: rank_correlation(-ratio[draw].mean(0), loss[draw].mean(0)), seeds, 1.0
    )
    decades = bootstrap(
        lambda draw: (
            best_place(precisions, -ratio[draw].mean(0)) - best_place(precisions, loss[draw].mean(0))
        ),
        seeds,
    )
    highest = mean_interval(ratio.max(1))
    span = f"λ from {precisions[0]:g} to {precisions[-1]:g}, all converged"
    return [
        Claim(
            "fig2",
            "2. Evidence ranks L2 as test cross-entropy does",
            f"rank correlation of −log evidence ratio and test cross-entropy over {len(precisions)} {span}",
            *correlation,
            f"≥ {CORRELATED:g}",
            above(CORRELATED, *correlation[1:]),
        ),
        Claim(
            "fig2",
            "2. Evidence picks the L2 of the least test cross-entropy",
            "log10 (best λ by evidence / best λ by test cross-entropy), true labels",
            *decades,
            f"within ±{DECADES:g}",
            optima_agree(DECADES, *decades[1:], -ratio.mean(0), loss.mean(0)),
        ),
        Claim(
            "fig2",
            "2. True labels are favoured",
            "largest log evidence ratio over λ, true labels (nats)",
            *highest,
            "> 0",
            above(0.0, *highest[1:]),
        ),
    ]


def _random_label_claims(curves: _Curves) -> list[Claim]:
    ratio = curves.settled("log_evidence_ratio", "random")
    weak = mean_interval(ratio[:, 0])
    highest = mean_interval(ratio.max(1))
    never = "holds" if ratio.max() <= FAVOURED else "does not hold"
    return [
        Claim(
            "fig2",
            "2. Random labels are not believed when weakly regularised",
            f"log evidence ratio, random labels, λ = {curves.precisions[0]:g} (nats)",
            *weak,
            "< 0",
            above(0.0, -weak[2], -weak[1]),
        ),
        Claim(
            "fig2",
            "2. Random labels are never favoured",
            f"largest log evidence ratio over λ, random labels, mean over draws (nats); of all {ratio.max():.2g}",
            *highest,
            f"all ≤ {FAVOURED:g}",
            never,
        ),
    ]


def _lightning_claim(curves: _Curves) -> Claim:
    difference = curves.lightning("log_evidence_ratio")
    estimate = mean_interval(difference)
    return Claim(
        "fig2",
        "A Lightning run with LaplaceEvidence gives the same number",
        f"log evidence ratio of a Trainer's run − that of the fit, λ = {curves.preset.lightning_precision:g} (nats)",
        *estimate,
        f"all within ±{AGREEMENT:g}",
        "holds" if np.abs(difference).max() <= AGREEMENT else "does not hold",
    )

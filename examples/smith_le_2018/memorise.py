"""(a) A net memorises random labels, and its exact evidence says so (Zhang et al. 2016; Smith & Le for nets)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from examples.smith_le_2018.claims import Claim, above
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.intervals import mean_interval
from examples.smith_le_2018.plotting import band, figure, log_axis
from examples.smith_le_2018.settled import NETS, NetSettings
from examples.smith_le_2018.trials import Trials

__all__ = ["memorise"]

COLOURS = {"true": "#1f4fd8", "random": "#e07b00"}
MARKERS = {"true": "o", "random": "s"}
MEMORISED = 0.99
"""Training accuracy from which labels count as memorised."""
CLAIM = "(a) A net memorises random labels, and its exact evidence says so"


def memorise(context: Context) -> list[Claim]:
    """The same nets with true and with random labels: training accuracy, test accuracy and exact evidence over λ."""
    preset = context.preset.evidence
    trials = Trials(NETS, context)
    precisions = preset.random_precisions

    def settings(task: str, precision: float, seed: int) -> NetSettings:
        return NetSettings(preset.net_examples, preset.net_hidden, task, precision, seed)

    def wanted(seed: int) -> list[NetSettings]:
        return [settings(task, precision, seed) for task in COLOURS for precision in precisions]

    seeds = trials.measure("memorise", wanted, preset.net_seeds)
    found = {
        (column, task): trials.grid(
            column,
            lambda precision, seed, task=task: settings(task, precision, seed),  # type: ignore[misc]
            seeds,
            precisions,
        )
        for column in ("train_accuracy", "test_accuracy", "log_evidence_ratio", "newton_decrement")
        for task in COLOURS
    }
    with figure(context.folder / "memorise.png", columns=2, width=8.8) as (_, (left, right)):
        _accuracies(left, np.array(precisions), found)
        for task, colour in COLOURS.items():
            band(
                right,
                np.array(precisions),
                found["log_evidence_ratio", task],
                marker=MARKERS[task],
                color=colour,
                label=f"{task} labels",
            )
        right.axhline(0, color="#888888", linewidth=1)
        right.set_ylabel("exact log evidence ratio (nats)")
        right.legend(fontsize=9)
        for axis in (left, right):
            log_axis(axis, "x", list(precisions))
            axis.set_xlabel("L2: prior precision λ = N · weight decay")
    return _claims(precisions, found)


def _accuracies(axis: Axes, precisions: np.ndarray, found: dict[tuple[str, str], np.ndarray]) -> None:
    for task, colour in COLOURS.items():
        for column, style in (("train_accuracy", "-"), ("test_accuracy", "--")):
            label = f"{column.split('_')[0].replace('train', 'training')}, {task} labels"
            band(
                axis,
                precisions,
                found[column, task],
                marker=MARKERS[task],
                linestyle=style,
                color=colour,
                label=label,
            )
    axis.set(ylim=(0, 1.05), ylabel="accuracy")
    axis.legend(fontsize=8, loc="center left")


def _claims(precisions: tuple[float, ...], found: dict[tuple[str, str], np.ndarray]) -> list[Claim]:
    weakest = f"λ = {precisions[0]:g}"
    memorised = mean_interval(found["train_accuracy", "random"][:, 0])
    ratio = {task: found["log_evidence_ratio", task][:, 0] for task in COLOURS}
    random, difference = mean_interval(ratio["random"]), mean_interval(ratio["true"] - ratio["random"])
    best = mean_interval(found["log_evidence_ratio", "true"].max(1))
    highest = found["log_evidence_ratio", "random"].max(1)
    decrement = found["newton_decrement", "random"][:, 0].max()
    all_same = found["train_accuracy", "random"][:, 0].min() > MEMORISED
    rows = [
        (
            f"training accuracy on random labels, {weakest}",
            memorised,
            f"all > {MEMORISED:g}",
            "holds" if all_same else "does not hold",
        ),
        (
            f"exact log evidence ratio on random labels, {weakest} (nats; Newton decrement at most {decrement:.2g})",
            random,
            "< 0",
            above(0.0, -random[2], -random[1]),
        ),
        (
            f"the same, true − random labels, {weakest} (nats)",
            difference,
            "> 0",
            above(0.0, *difference[1:]),
        ),
        (
            "largest exact log evidence ratio over λ, true labels (nats)",
            best,
            "> 0",
            above(0.0, *best[1:]),
        ),
        (
            f"largest exact log evidence ratio over λ, random labels (nats); of all {highest.max():,.0f}",
            mean_interval(highest),
            "all ≤ 1",
            "holds" if highest.max() <= 1 else "does not hold",
        ),
    ]
    return [
        Claim("memorise", CLAIM, quantity, *estimate, expected, verdict)
        for quantity, estimate, expected, verdict in rows
    ]

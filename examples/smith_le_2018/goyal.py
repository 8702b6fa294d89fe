"""(d) Goyal et al. 2017: accuracy stays what it is while ε/B does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from examples.smith_le_2018.claims import Claim
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.figure_5 import learning_rate_runs
from examples.smith_le_2018.intervals import mean_interval, within
from examples.smith_le_2018.plotting import band, colours, figure, log_axis

__all__ = ["goyal"]

NEGLIGIBLE = 0.01
"""Accuracy per decade of ε that still counts as the same accuracy."""


@dataclass(frozen=True)
class _Line:
    """Runs of one ε/B."""

    label: str
    rates: np.ndarray
    accuracies: np.ndarray

    def per_decade(self) -> np.ndarray:
        """Change of accuracy with each decade of ε, [seeds]."""
        return np.array([stats.linregress(np.log10(self.rates), row).slope for row in self.accuracies])


def goyal(context: Context) -> list[Claim]:
    """The runs of figure 5, ordered by ε/B instead of ε."""
    preset = context.preset
    seeds = context.measure(
        "goyal",
        lambda seed: [
            run for rate in preset.learning_rates for run in learning_rate_runs(preset, seed, rate)
        ],
    )
    kept = [_same_ratio(context, seeds, size) for size in preset.around]
    kept = [line for line in kept if len(line.rates) > 2]
    best = int(np.argmax([line.accuracies.mean() for line in kept]))
    with figure(context.folder / "goyal.png", columns=1, width=7.2, height=3.8) as (_, (axis,)):
        for line, colour in zip(kept, colours(len(kept)), strict=True):
            band(axis, line.rates, line.accuracies, color=colour, label=line.label)
        log_axis(axis, ticks=list(preset.learning_rates))
        highest = kept[best].accuracies.mean()
        axis.set_ylim(highest - 0.06, highest + 0.01)
        axis.set(xlabel="learning rate ε", ylabel="test accuracy")
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axis.legend(title="B/ε, kept constant", fontsize=8, title_fontsize=8, **beside)
    return _claims(kept, kept[best])


def _same_ratio(context: Context, seeds: list[int], size: int) -> _Line:
    """Learning rates at which B is in proportion to ε, from `size` at the preset's own, and much less than N."""
    preset = context.preset
    batch = {rate: size * rate / preset.learning_rate for rate in preset.learning_rates}
    rates = [rate for rate, b in batch.items() if _whole(b) and b <= preset.num_examples / 4]
    accuracies = [
        [
            context.runs.value("test_accuracy", preset.run(round(batch[rate]), seed, learning_rate=rate))
            for rate in rates
        ]
        for seed in seeds
    ]
    return _Line(f"{size / preset.learning_rate:g}", np.array(rates), np.array(accuracies))


def _whole(size: float) -> bool:
    return size >= 1 and abs(size - round(size)) < 1e-6


def _claims(lines: list[_Line], best: _Line) -> list[Claim]:
    """At the best ε/B, and where the rule does worst: near the batches that do not train."""
    worst = max(lines, key=lambda line: abs(line.per_decade().mean()))
    kept = [line.label for line in lines if _verdict(line) == "holds"]
    rule = "(d) Accuracy stays what it is while ε/B does (Goyal et al.)"
    return [
        _claim(best, rule, ""),
        _claim(
            worst,
            f"{rule}, at any ε/B",
            f", where it moves most; it holds at {', '.join(kept) or 'none'}, of {len(lines)}",
        ),
    ]


def _claim(line: _Line, claim: str, remark: str) -> Claim:
    span = f"ε from {line.rates[0]:g} to {line.rates[-1]:g}"
    return Claim(
        "goyal",
        claim,
        f"test accuracy per decade of ε at B/ε = {line.label}, {span}{remark}",
        *mean_interval(line.per_decade()),
        f"within ±{NEGLIGIBLE:g}",
        _verdict(line),
    )


def _verdict(line: _Line) -> str:
    return within(NEGLIGIBLE, *mean_interval(line.per_decade())[1:])

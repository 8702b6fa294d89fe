"""Figure 3: small batches generalise better than the full batch, and L2 shrinks the gap."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from examples.smith_le_2018.claims import Claim, above
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.intervals import bootstrap, mean_interval
from examples.smith_le_2018.plotting import figure, log_axis
from examples.smith_le_2018.presets import Preset

__all__ = ["figure_3"]


def figure_3(context: Context) -> list[Claim]:
    """A small batch against the full one while training, and the gap at the end over the strength of L2."""
    preset = context.preset
    sizes = (preset.small_batch, preset.num_examples)
    steps = _moments(preset)

    def runs(seed: int) -> list[Run]:
        return [
            preset.run(size, seed, prior_precision=strength)
            for strength in preset.prior_precisions
            for size in sizes
        ]

    seeds = context.measure("fig3", runs, lambda run: steps)
    gaps = np.array([_gap(context, seeds, sizes, strength) for strength in preset.prior_precisions])
    with figure(context.folder / "fig3.png", columns=3, width=9.0) as (_, (left, middle, right)):
        _curves(left, context, seeds, sizes, "test_accuracy")
        _curves(middle, context, seeds, sizes, "test_loss")
        left.set_ylabel("test accuracy")
        left.legend(fontsize=9)
        middle.set_ylabel("test cross-entropy (nats per example)")
        _gap_over_l2(right, preset.prior_precisions, gaps)
    return [_gap_claim(preset, gaps[0]), *_shrinking_claims(preset, gaps)]


def _moments(preset: Preset) -> list[int]:
    """Steps of the curves, evenly spaced on a logarithmic axis."""
    last = preset.run(1, 0).steps
    return sorted({round(step) for step in np.geomspace(1, last, preset.points)})


def _gap(context: Context, seeds: list[int], sizes: tuple[int, int], strength: float) -> np.ndarray:
    """Test accuracy of the small batch less that of the full one, [seeds], at the end of training."""

    def run(size: int, seed: int) -> Run:
        return context.preset.run(size, seed, prior_precision=strength)

    small, full = context.column("test_accuracy", run, seeds, sizes).T
    return small - full


def _curves(axis: Axes, context: Context, seeds: list[int], sizes: tuple[int, int], column: str) -> None:
    """Means over seeds while training without L2, and their standard errors as a band."""
    steps = _moments(context.preset)
    for size, colour, style in zip(sizes, ("#1f4fd8", "#e07b00"), ("-", "--"), strict=True):
        values = np.array(
            [
                [context.runs.value(column, context.preset.run(size, seed), step) for step in steps]
                for seed in seeds
            ]
        )
        name = "full batch" if size == context.preset.num_examples else f"B = {size}"
        axis.plot(steps, values.mean(0), style, color=colour, label=name)
        if len(seeds) > 1:
            error = values.std(0, ddof=1) / np.sqrt(len(seeds))
            axis.fill_between(
                steps, values.mean(0) - error, values.mean(0) + error, color=colour, alpha=0.2, lw=0
            )
    log_axis(axis)
    axis.set_xlabel("steps")


def _gap_over_l2(axis: Axes, strengths: tuple[float, ...], gaps: np.ndarray) -> None:
    intervals = np.array([mean_interval(gap) for gap in gaps])
    reach = np.abs(intervals[:, 1:] - intervals[:, :1]).T
    error = reach if np.isfinite(reach).all() else None
    places = np.arange(len(strengths))
    axis.errorbar(places, intervals[:, 0], yerr=error, fmt="o-", color="#1f4fd8", capsize=3)
    axis.axhline(0, color="#888888", linewidth=1)
    axis.set_xticks(places, [f"{strength:g}" for strength in strengths])
    axis.set(xlabel="L2: prior precision λ", ylabel="accuracy gap, small − full batch")


def _gap_claim(preset: Preset, gap: np.ndarray) -> Claim:
    estimate = mean_interval(gap)
    return Claim(
        "fig3",
        "3. A small batch generalises better than the full one",
        f"test accuracy at B = {preset.small_batch} − at B = N = {preset.num_examples:,}, no L2",
        *estimate,
        "> 0",
        above(0.0, *estimate[1:]),
    )


def _shrinking_claims(preset: Preset, gaps: np.ndarray) -> list[Claim]:
    """How far the gap moves towards zero: where L2 makes the small batch the worse one, the gap has not shrunk."""
    claims = []
    for strength, gap in zip(preset.prior_precisions[1:], gaps[1:], strict=True):
        estimate = bootstrap(
            lambda draw, gap=gap: abs(gaps[0][draw].mean()) - abs(gap[draw].mean()),  # type: ignore[misc]
            len(gap),
        )
        claims.append(
            Claim(
                "fig3",
                "3. L2 shrinks the gap",
                f"size of the gap without L2 − with λ = {strength:g}",
                *estimate,
                "> 0",
                above(0.0, *estimate[1:]),
            )
        )
    return claims

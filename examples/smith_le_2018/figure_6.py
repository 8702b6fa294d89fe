"""Figure 6: the best batch size against the size of the training set."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from examples.smith_le_2018.best_batch import Sweep, draw, slope_claim
from examples.smith_le_2018.claims import Claim
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.presets import Preset

__all__ = ["figure_6", "num_examples_runs"]


PROPORTIONAL_FROM = 20_000
"""Examples from which on the paper says so."""


def figure_6(context: Context) -> list[Claim]:
    """Training sets from small to nearly all digits, each trained for the same number of steps."""
    preset = context.preset
    by_size = preset.by_num_examples
    seeds = context.measure(
        "fig6", lambda seed: [run for n in by_size for run in num_examples_runs(preset, seed, n)]
    )
    grids = [
        (sizes, context.column("test_accuracy", partial(preset.run, num_examples=n), seeds, sizes))
        for n, sizes in by_size.items()
    ]
    sweep = Sweep(list(by_size), grids, [f"N = {n:,}" for n in by_size])
    path = context.folder / "fig6.png"
    draw(path, sweep, "training examples N", accuracy_floor=lambda best: best - 0.12)
    claims = []
    if sum(n >= PROPORTIONAL_FROM for n in by_size) > 1:
        claim = "6. The best batch size is proportional to the training set's, where that is large"
        large = sweep.from_x(PROPORTIONAL_FROM)
        claims.append(slope_claim("fig6", claim, f"N, from {PROPORTIONAL_FROM:,} on", large))
    small = slope_claim("fig6", "6. The same where training sets are small as well", "N, all", sweep)
    edge = sweep.at_the_edge()
    unclaimed = "not claimed by the paper" + (
        f"; at the edge of the grid: {' and '.join(edge)}" if edge else ""
    )
    return [*claims, replace(small, expected=f"1 from N = {PROPORTIONAL_FROM:,} on", verdict=unclaimed)]


def num_examples_runs(preset: Preset, seed: int, num_examples: int) -> list[Run]:
    """The batch sizes of one N."""
    sizes = preset.by_num_examples[num_examples]
    return [preset.run(size, seed, num_examples=num_examples) for size in sizes]

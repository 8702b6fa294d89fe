"""Figure 6: the best batch size against the size of the training set."""

from __future__ import annotations

from functools import partial

from examples.smith_le_2018.best_batch import Sweep, draw, slope_claim
from examples.smith_le_2018.claims import Claim
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.presets import Preset

__all__ = ["figure_6", "num_examples_runs"]


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
    large = sweep.from_x(preset.proportional_from)
    claim = "6. The best batch size is proportional to the training set's"
    claims = [slope_claim("fig6", claim, f"N, from {preset.proportional_from:,} on", large)]
    if len(large.x) < len(sweep.x):
        claims.append(slope_claim("fig6", "The same, for smaller training sets as well", "N, all", sweep))
    return claims


def num_examples_runs(preset: Preset, seed: int, num_examples: int) -> list[Run]:
    """The batch sizes of one N."""
    sizes = preset.by_num_examples[num_examples]
    return [preset.run(size, seed, num_examples=num_examples) for size in sizes]

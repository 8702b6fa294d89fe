"""Figure 6: the best batch size against the size of the training set."""

from __future__ import annotations

from examples.smith_le_2018.best_batch import Sweep, draw, slope_claim
from examples.smith_le_2018.claims import Claim
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.engine import Run

__all__ = ["figure_6"]


def figure_6(context: Context) -> list[Claim]:
    """Training sets from 1,000 examples to nearly all, each trained for the same number of steps."""
    preset = context.preset
    by_size = preset.by_num_examples

    def runs(seed: int) -> list[Run]:
        return [preset.run(size, seed, num_examples=n) for n, sizes in by_size.items() for size in sizes]

    seeds = context.measure("fig6", runs)
    grids = []
    for n, sizes in by_size.items():
        make = lambda size, seed, n=n: preset.run(size, seed, num_examples=n)  # noqa: E731
        grids.append((sizes, context.column("test_accuracy", make, seeds, sizes)))
    sweep = Sweep(list(by_size), grids, [f"N = {n:,}" for n in by_size])
    law = draw(
        context.folder / "fig6.png",
        sweep,
        "training examples N",
        accuracy_floor=lambda best: best - 0.12,
    )
    return [
        slope_claim("fig6", "6. The best batch size is proportional to the training set's", "N", law),
    ]

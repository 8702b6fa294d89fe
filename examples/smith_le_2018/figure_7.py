"""Figure 7: the best batch size is proportional to 1/(1 - m)."""

from __future__ import annotations

from examples.smith_le_2018.best_batch import Sweep, draw, slope_claim
from examples.smith_le_2018.claims import Claim
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.engine import Run

__all__ = ["figure_7"]


def figure_7(context: Context) -> list[Claim]:
    """Momentum coefficients, each trained for the same number of steps."""
    preset = context.preset

    def runs(seed: int) -> list[Run]:
        return [
            preset.run(size, seed, momentum=m)
            for m in preset.momenta
            for size in preset.batch_sizes_about(momentum=m)
        ]

    seeds = context.measure("fig7", runs)
    grids = []
    for m in preset.momenta:
        sizes = preset.batch_sizes_about(momentum=m)
        make = lambda size, seed, m=m: preset.run(size, seed, momentum=m)  # noqa: E731
        grids.append((sizes, context.column("test_accuracy", make, seeds, sizes)))
    sweep = Sweep([1 / (1 - m) for m in preset.momenta], grids, [f"m = {m:g}" for m in preset.momenta])
    law = draw(
        context.folder / "fig7.png", sweep, "1/(1 − m), m the momentum", accuracy_floor=lambda best: best - 0.08
    )
    return [
        slope_claim("fig7", "7. The best batch size is proportional to 1/(1 − m)", "1/(1 − m)", law),
    ]

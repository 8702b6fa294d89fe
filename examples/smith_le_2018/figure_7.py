"""Figure 7: the best batch size is proportional to 1/(1 - m)."""

from __future__ import annotations

from functools import partial

from examples.smith_le_2018.best_batch import Sweep, draw, slope_claim
from examples.smith_le_2018.claims import Claim
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.presets import Preset

__all__ = ["figure_7", "momentum_runs"]


def figure_7(context: Context) -> list[Claim]:
    """Momentum coefficients, each trained for the same number of steps."""
    preset = context.preset
    seeds = context.measure(
        "fig7", lambda seed: [run for m in preset.momenta for run in momentum_runs(preset, seed, m)]
    )
    grids = []
    for m in preset.momenta:
        sizes = preset.batch_sizes_about(momentum=m)
        grids.append((sizes, context.column("test_accuracy", partial(preset.run, momentum=m), seeds, sizes)))
    sweep = Sweep([1 / (1 - m) for m in preset.momenta], grids, [f"m = {m:g}" for m in preset.momenta])
    path = context.folder / "fig7.png"
    draw(path, sweep, "1/(1 − m), m the momentum", accuracy_floor=lambda best: best - 0.08)
    claim = "7. The best batch size is proportional to 1/(1 − m)"
    return [slope_claim("fig7", claim, "1/(1 − m)", sweep)]


def momentum_runs(preset: Preset, seed: int, momentum: float) -> list[Run]:
    """The batch sizes of one m, about the best that the paper predicts."""
    sizes = preset.batch_sizes_about(momentum=momentum)
    return [preset.run(size, seed, momentum=momentum) for size in sizes]

"""Figure 5: the best batch size is proportional to the learning rate."""

from __future__ import annotations

from functools import partial

from examples.smith_le_2018.best_batch import Sweep, draw, slope_claim
from examples.smith_le_2018.claims import Claim, contains
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.peak import Grid, peak_ratio
from examples.smith_le_2018.presets import Preset

__all__ = ["figure_5", "learning_rate_runs"]


def figure_5(context: Context) -> list[Claim]:
    """Learning rates over more than a decade, each trained for T/ε steps; one of them also for twice as long."""
    preset = context.preset
    rates = [*preset.learning_rates, *preset.too_large]
    seeds = context.measure(
        "fig5", lambda seed: [run for rate in rates for run in learning_rate_runs(preset, seed, rate)]
    )
    grids = [_grid(context, seeds, rate) for rate in rates]
    sweep = Sweep(rates, grids, [f"ε = {rate:g}" for rate in rates], len(preset.learning_rates))
    draw(context.folder / "fig5.png", sweep, "learning rate ε", accuracy_floor=lambda best: best - 0.08)
    return [
        slope_claim("fig5", "5. The best batch size is proportional to the learning rate", "ε", sweep),
        _longer(context),
    ]


def learning_rate_runs(preset: Preset, seed: int, rate: float, times: float = 1.0) -> list[Run]:
    """The batch sizes of one learning rate, about the best that the paper predicts."""
    sizes = preset.batch_sizes_about(learning_rate=rate)
    return [preset.run(size, seed, learning_rate=rate, times=times) for size in sizes]


def _grid(context: Context, seeds: list[int], rate: float, times: float = 1.0) -> Grid:
    sizes = context.preset.batch_sizes_about(learning_rate=rate)
    run = partial(context.preset.run, learning_rate=rate, times=times)
    return sizes, context.column("test_accuracy", run, seeds, sizes)


def _longer(context: Context) -> Claim:
    """The best batch size after 2T in units of that after T."""
    rate = context.preset.longer
    seeds = context.measure("fig5, 2T", lambda seed: learning_rate_runs(context.preset, seed, rate, times=2))
    ratio = peak_ratio(_grid(context, seeds, rate, times=2), _grid(context, seeds, rate))
    return Claim(
        "fig5",
        "The best batch size does not depend on how long the training takes",
        f"best B after 2T ÷ best B after T, at ε = {rate:g}",
        *ratio,
        "1, to within a factor of 2",
        contains(1.0, *ratio[1:], least=0.5, most=2.0),
    )

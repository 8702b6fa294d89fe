"""(f) The accuracies of all sweeps against the noise scale alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from examples.smith_le_2018.claims import Claim, above
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.engine import Run
from examples.smith_le_2018.figure_5 import learning_rate_runs
from examples.smith_le_2018.figure_6 import num_examples_runs
from examples.smith_le_2018.figure_7 import momentum_runs
from examples.smith_le_2018.intervals import bootstrap
from examples.smith_le_2018.plotting import batch_axis, colours, figure, log_axis
from examples.smith_le_2018.presets import Preset

__all__ = ["collapse", "explained"]

MARKERS = "osD^vP*X<>dph"
SHOWN = 0.06
"""How far below the best accuracy the axes go."""
BINS_PER_OCTAVE = 2
"""Bins of g or B, within which accuracy should be the same: one place of the grids."""
ALONE = 0.9
"""Share from which on nothing but g is needed: what is left is the noise of the runs and the width of the bins."""


@dataclass(frozen=True)
class _Cloud:
    """Runs with their accuracies, [seeds, runs]."""

    label: str
    runs: list[Run]
    accuracies: np.ndarray


def collapse(context: Context) -> list[Claim]:
    """Runs of figures 4, 5 and 7, of one N, and those of figure 6 for each N."""
    preset = context.preset
    seeds = context.measure(
        "collapse", lambda seed: [run for _, runs in _sweeps(preset, seed) for run in runs]
    )
    clouds = [_cloud(context, seeds, number) for number in range(len(_sweeps(preset, 0)))]
    by_n = clouds[-len(preset.by_num_examples) :]
    same_n = clouds[: -len(by_n)]
    with figure(context.folder / "collapse.png", columns=3, width=9.0, height=4.4) as (made, axes):
        _scatter(axes[0], same_n, "batch_size")
        _scatter(axes[1], same_n, "noise_scale")
        _by_n(axes[2], by_n)
        axes[0].set_ylabel("test accuracy")
        # Below the panels: a dozen names over the points would hide them.
        for axis, where, columns, title in (
            (axes[1], "left", 5, "left and middle"),
            (axes[2], "right", 2, "right"),
        ):
            named = axis.get_legend_handles_labels()
            made.legend(*named, fontsize=9, ncols=columns, loc=f"outside lower {where}", title=title)
    return _claims(same_n)


def _sweeps(preset: Preset, seed: int) -> list[tuple[str, list[Run]]]:
    found = [
        ("fig. 4", [preset.run(size, seed) for size in preset.batch_sizes if size < preset.num_examples])
    ]
    found += [(f"ε = {rate:g}", learning_rate_runs(preset, seed, rate)) for rate in preset.learning_rates]
    found += [(f"m = {m:g}", momentum_runs(preset, seed, m)) for m in preset.momenta]
    found += [(f"N = {n:,}", num_examples_runs(preset, seed, n)) for n in preset.by_num_examples]
    return found


def _cloud(context: Context, seeds: list[int], number: int) -> _Cloud:
    per_seed = [_sweeps(context.preset, seed)[number] for seed in seeds]
    accuracies = [[context.runs.value("test_accuracy", run) for run in runs] for _, runs in per_seed]
    return _Cloud(per_seed[0][0], per_seed[0][1], np.array(accuracies))


def _scatter(axis: Axes, clouds: list[_Cloud], of: str) -> None:
    """All settings of one N, those that did not train below the axis."""
    best = max(cloud.accuracies.mean(0).max() for cloud in clouds)
    for cloud, colour, marker in zip(clouds, colours(len(clouds)), MARKERS[: len(clouds)], strict=True):
        mean = cloud.accuracies.mean(0)
        seen = mean > best - SHOWN
        x = np.array([getattr(run, of) for run in cloud.runs])
        axis.plot(x[seen], mean[seen], marker, color=colour, alpha=0.8, label=cloud.label)
    axis.set_ylim(best - SHOWN, best + 0.05 * SHOWN)
    if of == "batch_size":
        batch_axis(axis)
    else:
        _noise_axis(axis)


def _by_n(axis: Axes, clouds: list[_Cloud]) -> None:
    for cloud, colour in zip(clouds, colours(len(clouds)), strict=True):
        mean = cloud.accuracies.mean(0)
        axis.plot(
            [run.noise_scale for run in cloud.runs], mean - mean.max(), "o-", color=colour, label=cloud.label
        )
    axis.set_ylim(-0.03, 0.002)
    axis.set_ylabel("test accuracy less the best of that N")
    _noise_axis(axis)


def _noise_axis(axis: Axes) -> None:
    log_axis(axis)
    axis.set_xlabel("noise scale g = ε(N/B − 1)/(1 − m)")


def explained(x: np.ndarray, accuracy: np.ndarray) -> float:
    """Share of the variance of the ranks of accuracy that bins of log x explain, corrected for their number.

    1 - (within-bin sum of squares / (n - bins)) / (total sum of squares / (n - 1)). Ranks, so that the runs that
    did not train do not count for more than all the others.

    Args:
        x: [n], positive.
        accuracy: [n].

    Returns:
        At most 1; about 0 if x says nothing.
    """
    ranks = stats.rankdata(accuracy)
    bins = np.floor(np.log2(x) * BINS_PER_OCTAVE).astype(int)
    names = np.unique(bins)
    within = sum(((ranks[bins == name] - ranks[bins == name].mean()) ** 2).sum() for name in names)
    total = ((ranks - ranks.mean()) ** 2).sum()
    return float(1 - (within / (len(x) - len(names))) / (total / (len(x) - 1)))


def _claims(clouds: list[_Cloud]) -> list[Claim]:
    """How much g explains, and how much more than B does."""
    first: dict[Run, np.ndarray] = {}
    for cloud in clouds:
        # The preset's own ε and m are part of several sweeps: each run counts once.
        first |= dict(zip(cloud.runs, cloud.accuracies.T, strict=True))
    values = np.array(list(first.values())).T
    scales = np.array([run.noise_scale for run in first])
    sizes = np.array([run.batch_size for run in first], dtype=float)

    def by_scale(draw: np.ndarray) -> float:
        return explained(scales, values[draw].mean(0))

    def more(draw: np.ndarray) -> float:
        return by_scale(draw) - explained(sizes, values[draw].mean(0))

    share, excess = bootstrap(by_scale, len(values), most=1.0), bootstrap(more, len(values))
    quantity = "share of the variance of accuracy's ranks that g explains"
    return [
        Claim(
            "collapse",
            "8. The noise scale says more of the accuracy than the batch size does",
            f"{quantity}, less that which B explains; {len(first)} settings of one N",
            *excess,
            "> 0",
            above(0.0, *excess[1:]),
        ),
        Claim(
            "collapse",
            "8. Accuracy depends on the noise scale alone",
            f"{quantity}; {len(first)} settings of one N",
            *share,
            f"≥ {ALONE:g}",
            above(ALONE, *share[1:]),
        ),
    ]

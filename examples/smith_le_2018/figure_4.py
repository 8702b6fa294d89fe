"""Figure 4: test accuracy against batch size has a maximum inside."""

from __future__ import annotations

import numpy as np

from examples.smith_le_2018.claims import Claim, above
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.intervals import mean_interval
from examples.smith_le_2018.peak import best_batch_size
from examples.smith_le_2018.plotting import band, batch_axis, figure, log_axis

__all__ = ["figure_4"]


def figure_4(context: Context) -> list[Claim]:
    """Batch sizes from 1 to N at one learning rate."""
    preset = context.preset
    sizes = preset.batch_sizes
    seeds = context.measure("fig4", lambda seed: [preset.run(size, seed) for size in sizes])
    accuracy, loss = (
        context.column(name, preset.run, seeds, sizes) for name in ("test_accuracy", "test_loss")
    )
    best = best_batch_size(sizes, accuracy)
    with figure(context.folder / "fig4.png") as (_, (left, right)):
        for axis, values, name in (
            (left, accuracy, "test accuracy"),
            (right, loss, "test cross-entropy (nats per example)"),
        ):
            band(axis, np.array(sizes), values, color="#1f4fd8")
            axis.axvline(
                best, color="#888888", linestyle="--", linewidth=1, label=f"best accuracy: B = {best:.0f}"
            )
            axis.set_ylabel(name)
            batch_axis(axis)
        log_axis(right, "y", [0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0])
        left.legend(loc="lower right", fontsize=9)
    settings = f"N = {preset.num_examples:,}, ε = {preset.learning_rate:g}, m = {preset.momentum:g}"
    return [_claim(sizes, accuracy, end, where, settings) for end, where in ((0, "smallest"), (-1, "full"))]


def _claim(sizes: list[int], accuracy: np.ndarray, end: int, where: str, settings: str) -> Claim:
    """Best inside against one end; each seed's best batch size is chosen by the other seeds."""
    others = [
        np.delete(accuracy, seed, 0) if len(accuracy) > 1 else accuracy for seed in range(len(accuracy))
    ]
    inside = np.array([found[other.mean(0).argmax()] for found, other in zip(accuracy, others, strict=True)])
    estimate = mean_interval(inside - accuracy[:, end])
    return Claim(
        "fig4",
        "4. The best batch size lies inside",
        f"test accuracy of the best batch − that of the {where} (B = {sizes[end]:,}); {settings}",
        *estimate,
        "> 0",
        above(0.0, *estimate[1:]),
    )

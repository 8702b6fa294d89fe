"""Error against time, one panel a model, a colour for each library and a marker for each structure."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from summary import candidates, of_candidate
from table import Row, median_of, number, select

__all__ = ["draw"]

FLOOR = 1e-3
"""Nats below which an error is rounding: float32 holds a log-evidence of 1,000 to about that."""
COLOURS = {
    "lightning-bayes": "#1f4fd8",
    "laplace-torch BackPackGGN": "#e07b00",
    "laplace-torch CurvlinopsGGN": "#b8336a",
    "laplace-torch AsdlGGN": "#7a5195",
    "curvlinops": "#2a9d5c",
    "torch": "#555555",
}
MARKERS = {
    "full": "o",
    "kron": "s",
    "kron_joint": "P",
    "kron_expand": "X",
    "diag": "^",
    "tolerance 1": "D",
    "tolerance 10": "d",
    "lanczos": "p",
    "blocks": "v",
    "auto": "*",
}
TITLES = {
    "logistic": "logistic regression, 0 against 1",
    "mlp-1000": "784-800-10",
    "mlp-5000": "784-800-10",
    "mlp-60000": "784-800-10",
    "lenet": "LeNet",
    "resnet18": "ResNet-18, 32 × 32",
    "transformer": "transformer, 2 layers",
}


def draw(rows: list[Row], path: Path) -> None:
    """Write the figure: a panel for each model whose exact number is known."""
    models = [name for name in TITLES if any(row["exact"] for row in select(rows, model=name))]
    if not models:
        return
    columns = min(len(models), 3)
    lines = math.ceil((len(models) + 1) / columns)  # one place for the legend
    style = {"font.size": 9, "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True}
    with plt.rc_context(style):
        figure, axes = plt.subplots(lines, columns, figsize=(3.7 * columns, 3.1 * lines), squeeze=False)
        places = list(axes.flat)
        for axis, model in zip(places, models, strict=False):
            _panel(axis, model, select(rows, model=model))
        for axis in places[len(models) :]:
            axis.axis("off")
        _legend(places[len(models)])
        figure.tight_layout()
        figure.savefig(path, dpi=130, facecolor="white")
        plt.close(figure)


def _panel(axis: Axes, model: str, rows: list[Row]) -> None:
    failed = []
    for candidate in candidates(rows):
        library = " ".join(filter(None, candidate[:2]))
        if candidate[2] not in MARKERS:
            continue
        runs = of_candidate(rows, candidate)
        passes, error = median_of(runs, "gradient_passes"), median_of(runs, "error")
        # The estimate that others are compared with is off by its standard error itself.
        stderr = 0.0 if math.isnan(spread := median_of(runs, "stderr")) else spread
        if math.isnan(passes) or math.isnan(error):
            failed.append((library, candidate[2]))
            continue
        ours = library == "lightning-bayes"
        axis.scatter(
            passes,
            max(abs(error), stderr, FLOOR),
            s=75 if ours else 42,
            marker=MARKERS[candidate[2]],
            color=COLOURS[library],
            alpha=0.95 if ours else 0.75,
            zorder=3 if ours else 2,
            edgecolors="white",
            linewidths=0.6,
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yscale("log")
    axis.set_ylim(FLOOR / 2, None)
    axis.margins(x=0.15, y=0.2)
    axis.axhspan(FLOOR / 2, FLOOR * 2, color="#f2f6ff", zorder=0)
    axis.set_xlabel("time, gradient passes")
    axis.set_ylabel("|error|, or its standard error if larger, nats")
    examples, parameters = int(number(rows[0], "num_examples")), int(number(rows[0], "parameters"))
    axis.set_title(f"{TITLES[model]}\nN = {examples:,}, p = {parameters:,}", fontsize=9)
    lines = [f"no {structure}" for library, structure in failed if library == "lightning-bayes"]
    peers = sum(library != "lightning-bayes" for library, _ in failed)
    all_peers = sum(
        candidate[0] != "lightning-bayes" for candidate in candidates(rows) if candidate[2] in MARKERS
    )
    if peers:
        lines.insert(0, f"{peers} of {all_peers} peers raise or exceed the limits")
    # Between the approximations above and the exact ones below there is room.
    axis.text(0.97, 0.5, "\n".join(lines), transform=axis.transAxes, ha="right", va="center", fontsize=7)


def _legend(axis: Axes) -> None:
    def entry(label: str, colour: str, marker: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=colour, label=label, markersize=7)

    structures = {
        "kron_joint": "kron, weight and bias joint",
        "kron_expand": "kron, positions apart",
        "tolerance 1": "bracket of 1 nat",
        "tolerance 10": "bracket of 10 nats",
        "auto": "auto",
    }
    handles = [entry(name, colour, "o") for name, colour in COLOURS.items()]
    handles += [entry(structures.get(name, name), "#999999", marker) for name, marker in MARKERS.items()]
    axis.legend(handles=handles, loc="center", frameon=False, fontsize=8, ncols=1)

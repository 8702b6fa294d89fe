"""Which evidence picks the L2 of the least test cross-entropy at N = 10,000 and 60,000: `lanczos`, `kron` or `diag`?

    python -m benchmarks.choose_l2 --mnist-root DIR [--num-examples 10000 60000] [--rounds 3] [--draw]
                                   [--output docs/benchmarks/choose_l2.csv]

784-800-10 in float32. For each seed of training set and initial weights one λ after the other, from the largest down,
each started from the minimum of the one before and taken to its own by L-BFGS on the whole set: at most --rounds
hundred iterations, fewer once no Newton decrement can be a nat. `lanczos` by four vectors, the same at every λ. Rows
are written one by one; what is there is not run again, and the weights to start from wait in the temporary folder.
About an hour a size on two cores. With --draw only the table and the figure, beside the CSV; a size with seeds that
have not come to their last λ is drawn from those that have.

Fixed before the run: the minimum is believed where the Newton decrement, with what may be missing of it, is below 5 %
of the difference of the evidence to the next λ (column `settled`). Best places are vertices of parabolas through the
best of the grid and its neighbours, as in the README's figure for N = 1,000.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.table import Row, markdown_table, number, read_rows, write_rows
from examples.smith_le_2018.data import Digits, load_digits, pixels, training_set
from examples.smith_le_2018.intervals import best_place, chosen_cost
from examples.smith_le_2018.model import network
from examples.smith_le_2018.plotting import band, figure, log_axis
from examples.smith_le_2018.settled import scores, settle
from lightning_bayes import laplace_evidence

STUDIES = {
    10_000: ((100.0, 31.6, 10.0, 3.16, 1.0, 0.316, 0.1), (0, 1, 2)),
    60_000: ((31.6, 10.0, 3.16, 1.0, 0.316), (0,)),
}
"""λ from the largest down, and seeds, by N."""
NUM_PROBES = 4
STRUCTURES = {"lanczos": ("#1f4fd8", "o"), "kron": ("#e07b00", "s"), "diag": ("#a3195b", "^")}
SETTLED_SHARE = 0.05
"""Of the difference of the evidence to a neighbouring λ, that the Newton decrement may be."""


def measure(
    net: nn.Module, digits: Digits, num_examples: int, seed: int, precision: float, rounds: int
) -> Row:
    """Take one net to its minimum, and ask for its evidence by every structure."""
    images, labels = training_set(digits, num_examples, seed)
    inputs = pixels(images)
    with torch.no_grad():
        # Weights of pixels that are zero throughout: the prior alone acts on them, and their minimum is known.
        net[0].weight[:, (inputs == 0).all(0)] = 0.0
    start = time.perf_counter()
    iterations = settle(net, inputs, labels, precision, rounds)
    row: Row = {
        "num_examples": num_examples,
        "seed": seed,
        "prior_precision": precision,
        "iterations": iterations,
        "training_seconds": time.perf_counter() - start,
    }
    row["train_accuracy"], row["train_loss"] = scores(net, inputs, labels)
    row["test_accuracy"], row["test_loss"] = scores(net, pixels(digits.test_images), digits.test_labels)
    for structure in STRUCTURES:
        start = time.perf_counter()
        evidence = laplace_evidence(
            net,
            (inputs, labels),
            structure=structure,
            prior_precision=precision,
            num_probes=NUM_PROBES if structure == "lanczos" else None,
        )
        row[f"{structure}_seconds"] = time.perf_counter() - start
        row[f"{structure}_log_evidence_ratio"] = float(evidence.log_evidence_ratio)
        if structure == "lanczos":
            row["stderr"] = evidence.log_evidence_stderr
            row["newton_decrement"] = evidence.newton_decrement
            row["newton_decrement_error"] = evidence.newton_decrement_error
            row["effective_parameters"] = evidence.effective_parameters
            row["weight_penalty"] = evidence.weight_penalty
            row["log_occam_factor"] = evidence.log_occam_factor
    return row


def run(arguments: argparse.Namespace) -> list[Row]:
    """Everything that is missing, written as it comes."""
    path = Path(arguments.output)
    rows = read_rows(path) if path.exists() else []
    done = {(int(row["num_examples"]), int(row["seed"]), float(row["prior_precision"])) for row in rows}
    folder = Path(tempfile.gettempdir()) / "lightning-bayes-benchmarks"
    folder.mkdir(exist_ok=True)
    digits = load_digits(Path(arguments.mnist_root))
    for size in arguments.num_examples:
        precisions, seeds = STUDIES[size]
        for seed in seeds:
            net, digit = network(seed), f"choose-l2-{size}-{seed}"
            for precision in precisions:
                weights = folder / f"{digit}-{precision:g}-{arguments.rounds}.pt"
                if (size, seed, precision) not in done:
                    row = measure(net, digits, size, seed, precision, arguments.rounds)
                    torch.save(net.state_dict(), weights)
                    rows.append({key: str(value) for key, value in row.items()})
                    write_rows(path, rows, list(rows[0]))
                    print({key: f"{value:.5g}" for key, value in row.items()}, flush=True)
                elif weights.exists():
                    net.load_state_dict(torch.load(weights, weights_only=True))
                # Else the weights are lost, and the next λ starts from what is at hand: its own decrement tells.
    return rows


def grids(rows: list[Row]) -> Iterator[tuple[int, np.ndarray, Any]]:
    """N, λ ascending, and a function that gives a column as [seeds, λ], of the seeds that are complete."""
    for size, (precisions, seeds) in STUDIES.items():
        own = {
            (int(row["seed"]), float(row["prior_precision"])): row
            for row in rows
            if int(row["num_examples"]) == size
        }
        complete = [seed for seed in seeds if all((seed, one) in own for one in precisions)]
        ascending = sorted(precisions)
        if complete:
            yield (
                size,
                np.array(ascending),
                lambda column, own=own, complete=complete, ascending=ascending: np.array(
                    [[number(own[seed, one], column) for one in ascending] for seed in complete]
                ),
            )


def table(rows: list[Row]) -> str:
    """What each structure picks, and what that costs."""
    header = [
        "structure",
        "N",
        "seeds",
        "best λ",
        "best λ by test cross-entropy",
        "test cross-entropy lost",
        "settled",
    ]
    lines = []
    for size, x, column in grids(rows):
        loss = column("test_loss")
        evidence = column("lanczos_log_evidence_ratio")
        most = (column("newton_decrement") + column("newton_decrement_error")).max(0)
        steps = np.abs(np.diff(evidence.mean(0)))
        beside = np.minimum(np.append(steps, np.inf), np.insert(steps, 0, np.inf))
        unsettled = [f"{one:g}" for one in x[most > SETTLED_SHARE * beside]]
        settled = "all" if not unsettled else f"not at {', '.join(unsettled)}"
        for structure in STRUCTURES:
            ratio = column(f"{structure}_log_evidence_ratio")
            lines.append(
                [
                    f"`{structure}`",
                    f"{size:,}",
                    f"{len(loss)}",
                    f"{10 ** best_place(x, -ratio.mean(0)):.3g}",
                    f"{10 ** best_place(x, loss.mean(0)):.3g}",
                    f"{chosen_cost(-ratio, loss).mean():.4f}",
                    settled,
                ]
            )
    return markdown_table(header, lines)


def draw(rows: list[Row], path: Path) -> None:
    """In the form of the README's figure: a row of panels for each N."""
    of_sizes = list(grids(rows))
    with figure(path, columns=2, rows=len(of_sizes), width=9.0, height=3.7 * len(of_sizes)) as (made, axes):
        for (left, right), (size, x, column) in zip(
            np.reshape(np.array(axes), (-1, 2)), of_sizes, strict=True
        ):
            loss = column("test_loss")
            best = x[loss.mean(0).argmin()]
            ratios = {name: column(f"{name}_log_evidence_ratio") for name in STRUCTURES}
            for name, (colour, marker) in STRUCTURES.items():
                label = f"{name}, best at λ = {x[ratios[name].mean(0).argmax()]:g}"
                band(left, x, ratios[name], marker=marker, color=colour, label=label)
            shown = np.concatenate([ratios["lanczos"].mean(0), ratios["kron"].mean(0)])
            span = np.append(shown, ratios["diag"].mean(0).max())  # diag falls out of every scale at weak L2
            left.set_ylim(span.min() - 0.1 * np.ptp(span), span.max() + 0.1 * np.ptp(span))
            left.set_ylabel("log evidence ratio (nats)")
            left.set_title(f"N = {size:,}, {len(loss)} seed{'s'[: len(loss) - 1]}", fontsize=9)
            band(right, x, loss, color="#444444", label=f"best at λ = {best:g}")
            right.set_ylabel("test cross-entropy (nats per example)")
            for axis in (left, right):
                axis.axvline(best, color="#888888", linestyle="--", linewidth=1)
                log_axis(axis, "x", [value for value in (0.01, 0.1, 1, 10, 100) if x[0] <= value <= x[-1]])
                axis.set_xlabel("L2: prior precision λ = N · weight decay")
                axis.legend(fontsize=8)
        made.align_labels()


def main() -> None:
    """Run what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist-root")
    parser.add_argument("--num-examples", type=int, nargs="+", choices=sorted(STUDIES), default=list(STUDIES))
    parser.add_argument("--rounds", type=int, default=3, help="hundreds of iterations of L-BFGS at most")
    parser.add_argument("--draw", action="store_true", help="only the table and the figure")
    parser.add_argument("--output", default="docs/benchmarks/choose_l2.csv")
    arguments = parser.parse_args()
    if arguments.mnist_root is None and not arguments.draw:
        parser.error("--mnist-root DIR is missing: the folder of MNIST in torchvision's layout.")
    path = Path(arguments.output)
    rows = read_rows(path) if arguments.draw else run(arguments)
    path.with_suffix(".md").write_text(table(rows))
    print(table(rows))
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""`structure="lanczos"` on 784-800-10 and MNIST: error, time, products and memory against the number of examples.

    python benchmarks/lanczos.py --mnist-root DIR [--sizes 15000 30000 60000] [--seeds 0 1] [--num-probes 8]
                                 [--curve] [--output docs/benchmarks/lanczos.csv]

Float32, λ = 1, the network of `models.py` that was trained on all 60,000; each row in a process of its own, written
as soon as it is there, and left out where it is there already. A gradient pass is forward and backward of the summed
loss over the same examples in the same batches, the median of three before and three after, as in evidence.py. A
product is K times one vector. With --curve also seven λ over three decades and the optimum, beside the value at the
smallest λ alone. Prints the table, and writes it beside the CSV, with the exponent of the time of one product in N
(least squares).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from models import MODELS, gradient_pass, trained
from table import Row, markdown_table, number, read_rows, write_rows
from worker import GRADIENT_PASSES, seconds

from lightning_bayes.evidence.curve import curve_of
from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.evidence.laplace import Computation
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.evidence.totals import Totals

NUMBERS = (
    *("num_examples", "log_evidence", "stderr", "lower", "upper", "gradient_passes", "gradient_seconds"),
    *("products", "steps", "product_seconds", "peak_gb"),
)
GRID = tuple(10 ** (-step / 2) for step in range(6, -1, -1))
"""λ of the curve, from 0.001 to 1."""


def measure(size: int, seed: int, num_probes: int, precision: str, mnist_root: str) -> dict[str, float]:
    """One evaluation, in this process; of "curve" the time of all, and the numbers at the optimum."""
    data = trained(MODELS["mlp-60000"], mnist_root)
    data = replace(data, x=data.x[:size].clone(), y=data.y[:size].clone())
    computation = Computation(
        structure="lanczos",
        batch_size=data.batch_size,
        num_probes=num_probes,
        seed=seed,
        prior_precision="optimize" if precision == "curve" else float(precision),
    )
    kept: dict[str, Any] = {}

    def conclude(totals: Totals) -> Evidence:
        kept["curvature"] = totals.curved
        if precision == "curve":
            kept["curve"] = curve_of(totals, list(GRID))
        return evidence_of(totals)

    computation.run(data.net, (data.x[:500], data.y[:500]), conclude)  # warms up
    before = [seconds(lambda: gradient_pass(data)) for _ in range(GRADIENT_PASSES)]
    start = time.perf_counter()
    evidence = computation.run(data.net, (data.x, data.y), conclude)
    elapsed = time.perf_counter() - start
    after = [seconds(lambda: gradient_pass(data)) for _ in range(GRADIENT_PASSES)]
    gradient = statistics.median(before + after)
    curvature = kept["curvature"]
    return {
        "num_examples": size,
        "seed": seed,
        "num_probes": num_probes,
        "prior_precision": precision,
        "log_evidence": evidence.log_evidence,
        "stderr": evidence.log_evidence_stderr,
        "lower": evidence.lower,
        "upper": evidence.upper,
        "effective_parameters": evidence.effective_parameters,
        "newton_decrement": evidence.newton_decrement,
        "seconds": elapsed,
        "gradient_seconds": gradient,
        "gradient_passes": elapsed / gradient,
        "steps": curvature.num_steps,
        "products": curvature.num_products,
        "product_seconds": curvature.product_seconds / curvature.num_products,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "curve": [] if "curve" not in kept else kept["curve"].log_evidence.tolist(),
        "difference_stderr": [] if "curve" not in kept else kept["curve"].difference_stderr.tolist(),
    }


def main() -> None:
    """Run what is missing, write, and print."""
    arguments = parse()
    if arguments.one is not None:
        size, seed, precision = arguments.one
        row = measure(int(size), int(seed), arguments.num_probes, precision, arguments.mnist_root)
        print(json.dumps(row))
        return
    path = Path(arguments.output)
    rows = read_rows(path) if path.exists() else []
    done = {(row["num_examples"], row["seed"], row["num_probes"], row["prior_precision"]) for row in rows}
    for size, seed, precision in wanted(arguments):
        if (str(size), str(seed), str(arguments.num_probes), precision) in done:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(size), str(seed), precision]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append({name: str(value) for name, value in json.loads(output.splitlines()[-1]).items()})
        rows.sort(key=lambda row: [float(row[name]) for name in ("num_probes", "num_examples", "seed")])
        write_rows(path, rows, list(rows[0]))
    path.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[int, int, str]]:
    """Sizes, seeds and priors."""
    for size in arguments.sizes:
        for seed in arguments.seeds:
            yield size, seed, "1.0"
    if arguments.curve:
        yield max(arguments.sizes), arguments.seeds[0], str(GRID[0])
        yield max(arguments.sizes), arguments.seeds[0], "curve"


def table(rows: list[Row]) -> str:
    """Of all rows, and by which power of N the time of a product grows."""
    header = [
        "N, λ",
        "seed",
        "vectors",
        "log-evidence, nats",
        "certified within",
        "passes",
        "products (steps)",
    ]
    header += ["a product, passes", "GB"]
    lines = []
    for row in rows:
        of = {name: number(row, name) for name in NUMBERS}
        precision = "seven λ and the best" if row["prior_precision"] == "curve" else row["prior_precision"]
        lines.append(
            [
                f"{of['num_examples']:,.0f}, {precision}",
                row["seed"],
                row["num_probes"],
                f"{of['log_evidence']:,.1f} ± {of['stderr']:.1f}",
                f"[{of['lower']:,.0f}, {of['upper']:,.0f}]",
                f"{of['gradient_passes']:.0f}",
                f"{of['products']:.0f} ({of['steps']:.0f})",
                f"{of['product_seconds'] / of['gradient_seconds']:.2f}",
                f"{of['peak_gb']:.1f}",
            ]
        )
    plain = [row for row in rows if row["prior_precision"] == "1.0"]
    sizes = np.log([number(row, "num_examples") for row in plain])
    if len(set(sizes)) == 1:
        return markdown_table(header, lines)
    times = np.log([number(row, "product_seconds") for row in plain])
    power = np.polyfit(sizes, times, 1)[0]
    return f"{markdown_table(header, lines)}\nThe time of one product grows as $N^{{{power:.2f}}}$ (λ = 1).\n"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist-root", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[15_000, 30_000, 60_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num-probes", type=int, default=8)
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--output", default="docs/benchmarks/lanczos.csv")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

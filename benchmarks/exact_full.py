"""Exact evidence of a trained 784-800-10 net, N = 1000, against the arithmetic that it cannot avoid.

    python benchmarks/exact_full.py [--repeats 5]

Side by side in one run, float32: `laplace_evidence(structure="full")` with every field filled; one matrix
product (9,000 × 800 × 9,000) and one Cholesky factorisation (9,000). Times are medians over the repeats,
which take turns. Peak memory is what the evidence adds to the resident set, as a multiple of the rows × rows
matrix; it is measured first, before anything else has claimed memory. Needs mlxtend (`.[examples]`).
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from models import MODELS, SEED, trained

from lightning_bayes import laplace_evidence

ROWS, WIDTH = 9000, 800


def resident_bytes() -> int:
    """Resident set now (Linux), else the peak so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return peak_bytes()


def peak_bytes() -> int:
    """Largest resident set so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Run, and print one line a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    data = trained(MODELS["mlp-1000"])
    net, x, y = data.net, data.x, data.y

    before = resident_bytes()
    evidence = laplace_evidence(net, (x, y), structure="full", prior_precision=1.0)
    matrix_bytes = 4 * ROWS**2
    memory = (peak_bytes() - before) / matrix_bytes
    print(evidence)
    for structure in ("kron", "diag"):
        other = laplace_evidence(net, (x, y), structure=structure, prior_precision=1.0).log_evidence
        print(
            f"{structure}: log-evidence {other:,.1f}, {other - evidence.log_evidence:+,.1f} nats from exact"
        )

    factors = torch.randn(ROWS, WIDTH)
    matrix = factors @ factors.T / WIDTH + torch.eye(ROWS)
    candidates: dict[str, Callable[[], object]] = {
        "evidence": lambda: laplace_evidence(net, (x, y), structure="full", prior_precision=1.0),
        "product": lambda: factors @ factors.T,
        "cholesky": lambda: torch.linalg.cholesky(matrix),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, function in candidates.items():
            times[name].append(seconds(function))
    medians = {name: statistics.median(values) for name, values in times.items()}
    floor = medians["product"] + medians["cholesky"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {repeats} repeats, seed {SEED}")
    for name, median in medians.items():
        print(f"{name:<10}{median:8.2f} s  ({min(times[name]):.2f} .. {max(times[name]):.2f})")
    print(f"evidence / (product + cholesky) = {medians['evidence'] / floor:.2f}   (target: at most 2)")
    print(f"peak memory / (rows x rows matrix) = {memory:.2f}   (target: at most 2.5)")


if __name__ == "__main__":
    main()

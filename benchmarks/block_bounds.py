"""Bounds on the evidence of 784-800-10 beyond exact: time and memory against the number of examples.

    python benchmarks/block_bounds.py --mnist-root DIR [--sizes 15000 30000 60000] [--landmarks 256] [--num-blocks 16]

`laplace_evidence(structure="blocks")` on so many digits, float32, each size in a process of its own; the
landmarks are held at one number, so that only the examples differ. With --num-blocks, from the rows of so many
random batches. Prints seconds, the bracket, the value with its standard error, the peak of the resident set beyond
the data, and the exponent of time in the number of examples (least squares).
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
from models import MODELS, trained

from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.evidence.laplace import Computation
from lightning_bayes.structures.base import Budget


def measure(size: int, landmarks: int, num_blocks: int | None, mnist_root: str) -> dict[str, float]:
    """One size, in this process."""
    data = trained(MODELS["mlp-60000"], mnist_root)
    x, y = data.x[:size].clone(), data.y[:size].clone()
    computation = Computation(
        structure="blocks", batch_size=250, num_blocks=num_blocks, budget=Budget(landmarks=landmarks)
    )
    computation.run(data.net, (x[:500], y[:500]), evidence_of)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    evidence = computation.run(data.net, (x, y), evidence_of)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "lower": evidence.lower,
        "upper": evidence.upper,
        "value": evidence.log_evidence,
        "stderr": evidence.log_evidence_stderr,
        "more_mb": (peak - before) / 1024,
    }


def main() -> None:
    """Run the sizes and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist-root", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[15_000, 30_000, 60_000])
    parser.add_argument("--landmarks", type=int, default=256)
    parser.add_argument("--num-blocks", type=int)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(
            json.dumps(
                measure(arguments.one, arguments.landmarks, arguments.num_blocks, arguments.mnist_root)
            )
        )
        return
    seconds = []
    for size in arguments.sizes:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(size)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        seconds.append(found["seconds"])
        print(
            f"N = {size:,}: {found['seconds']:.1f} s, {found['value']:,.0f} ± {found['stderr']:,.0f} nats in "
            f"[{found['lower']:,.0f}, {found['upper']:,.0f}], "
            f"{found['more_mb']:.0f} MB beyond what a pass over 500 examples took"
        )
    exponent = np.polyfit(np.log(arguments.sizes), np.log(seconds), 1)[0]
    print(f"time grows as N^{exponent:.2f}   (target: at most 1.1)")


if __name__ == "__main__":
    main()

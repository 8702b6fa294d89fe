"""What the proof of rows costs in each batch, in gradient passes of that batch; and the regrouping of its examples.

The truth is autograd's part of the proof: one backward pass, that any comparison with autograd needs.

Run: python -m benchmarks.proof [--seed 0] [--repeats 7]. Writes docs/benchmarks/proof.csv. A gradient pass is the
forward pass of the batch and one backward pass to the parameters; medians over repeats. Calls are recorded as for
every batch after the first. Rows that torch.func forms all at once are there for the structure in any case: what the
proof makes of them is timed, and not their forming.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.columns import LENGTH, WORDS, Transformer
from lightning_bayes.capture.as_written import throw_away_copy
from lightning_bayes.capture.forward import BatchForward, check_apart
from lightning_bayes.capture.isolation import isolated
from lightning_bayes.capture.module_calls import plain_kernels, recorded_calls
from lightning_bayes.likelihoods import Categorical
from lightning_bayes.rows.backward import ColumnPasses, gradients, proof_of
from lightning_bayes.rows.reader import RowReader
from lightning_bayes.rows.rows import DenseRows

OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "proof.csv"


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """784-800-10 on a batch of 256."""
    network = nn.Sequential(nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 10))
    return network, torch.randn(256, 784), torch.randint(10, (256,))


def lenet() -> tuple[nn.Module, Tensor, Tensor]:
    """LeNet-5 on a batch of 128."""
    convolutions = (nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU())
    dense = (nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    network = nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *dense)
    return network, torch.randn(128, 1, 28, 28), torch.randint(10, (128,))


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    """The transformer of `benchmarks.columns` on a batch of 32 sequences."""
    x, y = torch.randint(WORDS, (2, 32, LENGTH))
    return Transformer(), x, y


def resnet18() -> tuple[nn.Module, Tensor, Tensor]:
    """ResNet-18 on a batch of 16 images of 64 by 64."""
    import torchvision  # noqa: PLC0415 - only here

    return torchvision.models.resnet18(num_classes=10), torch.randn(16, 3, 64, 64), torch.randint(10, (16,))


NETWORKS = {"784-800-10": mlp, "LeNet-5": lenet, "transformer": transformer, "ResNet-18": resnet18}


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Median wall-clock time."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(make: Callable[[], tuple[nn.Module, Tensor, Tensor]], repeats: int) -> dict[str, float]:
    """Seconds of a gradient pass, of the proof, of autograd's part of it and of the regrouping."""
    model, x, y = make()
    network, likelihood = throw_away_copy(model), Categorical()
    parameters = dict(network.named_parameters())

    def gradient_pass() -> None:
        outputs, targets = likelihood.prepare(network(x), y)
        torch.autograd.grad(likelihood.unit_loss(outputs, targets), list(parameters.values()))

    reader = RowReader(network, parameters)
    for _ in reader.read(lambda: (network(x), y), likelihood).chunks:  # which makes the plan
        pass
    plan = reader._plan
    if plan is None:
        raise RuntimeError("the batch has no rows")
    with plain_kernels(), recorded_calls(plan.modules) as calls:  # as every batch that follows
        outputs, targets = likelihood.prepare(network(x), y)
    roots = likelihood.sqrt_hessian(outputs, targets)
    batch = ColumnPasses().back(calls, outputs, roots)
    layers = plan.layers(batch)
    for rows in layers:
        if isinstance(rows, DenseRows) and rows.kept_when_formed:
            rows.dense()

    def proof() -> None:
        made = proof_of(batch, roots)
        if made is None or plan.wrong(made, layers):
            raise RuntimeError("the rows are wrong")

    def truth() -> None:
        gradients(outputs, list(parameters.values()), torch.ones_like(outputs))

    forward = BatchForward(lambda pair: (network(pair[0]), pair[1]), (x, y))

    def regrouping() -> None:
        if not check_apart(forward, outputs, likelihood, network, parameters):
            raise RuntimeError("the examples could not be told apart")

    return {
        "gradient_pass": seconds_of(gradient_pass, repeats),
        "proof": seconds_of(proof, repeats),
        "truth": seconds_of(truth, repeats),
        "regrouping": seconds_of(regrouping, repeats),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rows = []
    for name, make in NETWORKS.items():
        torch.manual_seed(options.seed)
        with isolated():
            seconds = measure(make, options.repeats)
        whole = seconds["gradient_pass"]
        rows.append(
            {
                "network": name,
                "gradient_pass_ms": f"{1e3 * whole:.2f}",
                "proof_in_passes": f"{seconds['proof'] / whole:.2f}",
                "truth_in_passes": f"{seconds['truth'] / whole:.2f}",
                "regrouping_in_passes": f"{seconds['regrouping'] / whole:.2f}",
            }
        )
        print(rows[-1], flush=True)
    with OUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

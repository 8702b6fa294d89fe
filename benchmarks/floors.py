"""The work that no implementation can leave out, beside what this package and laplace-torch take: 784-800-10.

    python benchmarks/floors.py [--repeats 5] [--threads 2] [--output-dir docs/benchmarks]

Side by side in one process, float32, N = 1000 in batches of 250, λ = 1; all take turns. A floor is the bare
arithmetic of the log-determinant, in torch's own routines, on the numbers of the trained net: no gradient, no Newton
decrement, no check, nothing written down. Half a symmetric product counts as half.

- `diag`: one forward pass, C − 1 backward passes to the outputs of the layers, (g²)ᵀ(a²) of each layer.
- `kron`: the same passes, the factors aᵀa and gᵀg by half, their eigenvalues without vectors, dead entries left out.
- `full`: passes, one product (9,000 × 800 × 9,000, by half) and one Cholesky factorisation.
- `tolerance`: passes, the same for the rows that the bracket of this package keeps.

Writes floors.csv and floors.md. Needs `.[benchmark]`.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from models import MODELS, SEED, Trained, gradient_pass, trained
from peers import CANDIDATES
from torch import Tensor
from worker import copy_of

from lightning_bayes.likelihoods import Categorical
from lightning_bayes.structures.bracket import bracket

STRIP = 200
"""Rows of a symmetric product that are computed at one time, from the diagonal on."""
PEERS = {"diag": "laplace-torch BackPackGGN diag", "kron": "laplace-torch BackPackGGN kron"}
ASKED = {"diag": 4.0, "kron": 3.0}

Pairs = list[tuple[Tensor, Tensor]]
"""Of each layer: inputs [N, in], and gradients in its outputs [C − 1, N, out]."""


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output-dir", default="docs/benchmarks")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = trained(MODELS["mlp-1000"])
    works = works_of(data)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(arguments.repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "floors.csv", times, arguments)
    text = markdown(medians, arguments)
    (folder / "floors.md").write_text(text, encoding="utf-8")
    print(text)


def works_of(data: Trained) -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed, by structure and by who does it."""
    pairs = passes(data)
    works: dict[tuple[str, str], Callable[[], object]] = {
        ("gradient pass", "torch"): lambda: gradient_pass(data)
    }
    for structure, floor in (("diag", squares), ("kron", factors)):
        works[structure, "passes alone"] = lambda: passes(data)
        works[structure, "floor"] = lambda floor=floor: floor(passes(data))  # type: ignore[misc]
        works[structure, "lightning-bayes"] = run(data, f"lightning-bayes {structure}")
        works[structure, "laplace-torch"] = run(data, PEERS[structure])
    for structure in ("full", "tolerance 1", "tolerance 10"):
        rows = pairs[1][1].shape[:2].numel() if structure == "full" else rows_kept(data, structure)
        works[structure, "floor"] = lambda rows=rows: (passes(data), exact(rows))  # type: ignore[misc]
        works[structure, "lightning-bayes"] = run(data, f"lightning-bayes {structure}")
    return works


def run(data: Trained, candidate: str) -> Callable[[], object]:
    """A candidate of the benchmark on a network of its own."""
    return lambda: CANDIDATES[candidate].run(copy_of(data))


def passes(data: Trained) -> Pairs:
    """Forward, then C − 1 backward passes to the outputs of the layers, batch by batch."""
    first, activation, last = data.net  # type: ignore[misc]
    likelihood = Categorical()
    found = []
    for x, y in data.batches():
        with torch.no_grad():
            hidden = first(x)
        hidden.requires_grad_()
        active = activation(hidden)
        outputs = last(active)
        root = likelihood.sqrt_hessian(*likelihood.prepare(outputs.detach(), y))
        grads = [torch.autograd.grad(outputs, hidden, column, retain_graph=True)[0] for column in root]
        found.append((x, torch.stack(grads), active.detach(), root))
    x, grads, active, root = zip(*found, strict=True)
    return [(torch.cat(x), torch.cat(grads, 1)), (torch.cat(active), torch.cat(root, 1))]


def squares(pairs: Pairs) -> Tensor:
    """Log-determinant of the diagonal."""
    log_det = torch.zeros(())
    for inputs, grads in pairs:
        squared = grads.square().sum(0)
        log_det = log_det + (squared.mT @ inputs.square()).log1p().sum() + squared.sum(0).log1p().sum()
    return log_det


def factors(pairs: Pairs) -> Tensor:
    """Log-determinant of the Kronecker factors."""
    log_det = torch.zeros(())
    for inputs, grads in pairs:
        values, bias = eigenvalues(inputs) / len(inputs), eigenvalues(grads.flatten(0, 1))
        log_det = log_det + torch.outer(bias, values).log1p().sum() + bias.log1p().sum()
    return log_det


def eigenvalues(vectors: Tensor) -> Tensor:
    """Of Σ v vᵀ, without entries that are always 0, and of the smaller side."""
    vectors = vectors[:, (vectors != 0).any(0)]
    matrix = half_product(vectors if len(vectors) >= vectors.shape[1] else vectors.mT)
    return torch.linalg.eigvalsh(matrix, UPLO="U").clamp(min=0)


def half_product(vectors: Tensor) -> Tensor:
    """VᵀV on and above the diagonal."""
    matrix = vectors.new_empty(vectors.shape[1], vectors.shape[1])
    for start in range(0, len(matrix), STRIP):
        torch.mm(
            vectors[:, start : start + STRIP].mT,
            vectors[:, start:],
            out=matrix[start : start + STRIP, start:],
        )
    return matrix


def exact(rows: int) -> None:
    """Product and factorisation of so many rows."""
    vectors = torch.randn(rows, 800)
    matrix = half_product(vectors.mT).mT
    matrix.div_(800).diagonal().add_(1.0)
    torch.linalg.cholesky_ex(matrix, out=(matrix, torch.empty((), dtype=torch.int32)))


def rows_kept(data: Trained, structure: str) -> int:
    """Rows of the bracket."""
    with mock.patch.object(bracket, "factor_of", wraps=bracket.factor_of) as factor_of:
        run(data, f"lightning-bayes {structure}")()
    return len(factor_of.call_args.args[0].chosen)


def write_csv(path: Path, times: dict[tuple[str, str], list[float]], arguments: argparse.Namespace) -> None:
    """One row for each run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["structure", "who", "repeat", "seconds", "threads", "seed", "torch"])
        for (structure, who), values in times.items():
            for repeat, value in enumerate(values):
                row = [structure, who, repeat, f"{value:.6g}", arguments.threads, SEED, torch.__version__]
                writer.writerow(row)


def markdown(medians: dict[tuple[str, str], float], arguments: argparse.Namespace) -> str:
    """The table: seconds, and the largest factor by which laplace-torch could be beaten."""
    unit = medians["gradient pass", "torch"]
    head = ("structure", "floor, ms", "this package, ms", "laplace-torch, ms", "package / floor")
    head += ("faster than laplace-torch", "at most possible", "asked")
    lines = [
        f"784-800-10, N = 1000, float32, {arguments.threads} threads, seed {SEED}, medians of {arguments.repeats} "
        f"in turn; one gradient pass takes {1e3 * unit:.0f} ms.",
        "",
        f"| {' | '.join(head)} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for structure in dict.fromkeys(name for name, who in medians if who == "floor"):
        floor, own = medians[structure, "floor"], medians[structure, "lightning-bayes"]
        cells = [f"{1e3 * floor:.0f}", f"{1e3 * own:.0f}", "", f"{own / floor:.2f}", "", "", ""]
        if structure in PEERS:
            peer = medians[structure, "laplace-torch"]
            cells[2], cells[4], cells[5] = f"{1e3 * peer:.0f}", f"{peer / own:.2f}", f"{peer / floor:.2f}"
            cells[6] = f"{ASKED[structure]:.0f}"
        lines.append(f"| {structure} | {' | '.join(cells)} |")
    whole = medians["full", "lightning-bayes"]
    lines.append("")
    for tolerance, target in (("1", 0.4), ("10", 0.15)):
        name = f"tolerance {tolerance}"
        own, least = medians[name, "lightning-bayes"] / whole, medians[name, "floor"] / whole
        lines.append(
            f"- {name.capitalize()}: {own:.2f} of the exact time (asked: {target}); passes, product and "
            f"factorisation of the rows that it keeps take {least:.2f}."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Whether structure="lanczos" is unbiased and its 95 % interval one, on ten small problems over six decades of λ.

    python benchmarks/lanczos_coverage.py [--seeds 200] [--partial coverage.json] [--write]

Each problem is trained for a while, in float64; a tenth of its rows is selected, and eight vectors of random signs do
the rest. Against structure="full" at the same weights, over the seeds of the vectors:

- the mean of the log-evidence, in units of its own standard error, the spread over the square root of their number:
  at most `TOLERANCE`;
- the share of the seeds whose `Evidence.interval` holds the exact value: within `COVERAGE`.

Both were fixed before the first run. `--partial` keeps what has been computed, in rounds of 25 seeds, and goes on
from there; `--write` writes docs/benchmarks/lanczos_coverage.csv and .md.
"""

import argparse
import csv
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_bayes.evidence.evaluate import evidence_of
from lightning_bayes.evidence.laplace import Computation
from lightning_bayes.evidence.totals import Totals
from lightning_bayes.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from lightning_bayes.numerics.lanczos_quadrature import LanczosRecurrences, random_signs
from lightning_bayes.structures.base import Budget
from lightning_bayes.structures.lanczos import estimate
from lightning_bayes.structures.lanczos.estimate import SampledLogDet

TOLERANCE = 4.0
COVERAGE = (0.90, 0.995)
PRECISIONS = [10.0**decade for decade in range(-3, 4)]
ROUND, BATCH, SELECTED = 25, 32, 0.1
STEPS, LEARNING_RATE, NOISE = 300, 0.01, 0.3
FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
COLUMNS = (
    *(
        "problem",
        "parameters",
        "rows",
        "selected",
        "prior_precision",
        "exact",
        "bias",
        "stderr_of_mean",
        "deviation",
    ),
    *("spread", "stated", "coverage", "seeds", "unconverged", "bounds_hold", "passes"),
)
OF_CLASSES = torch.tensor([0.3, 2.0, 1.1, 0.7, 1.5], dtype=torch.float64)
POSITIVE = torch.tensor([3.0, 0.5, 1.2], dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A network at its trained weights with its data.

    Attributes:
        make: The network, and another one that labels the data.
        inputs: Of all examples.
        targets: From the outputs of that other network.
        loss: The mean that is trained on.
        likelihood: Its.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    likelihood: str | Likelihood


class Tokens(nn.Module):
    """A causal transformer layer over embedded tokens, with logits [N, T, words] or [N, C] from their mean."""

    def __init__(self, words: int, classes: int | None, width: int = 8, length: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.block = nn.TransformerEncoderLayer(width, 2, width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, classes or words)
        self.mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
        self.of_sequence = classes is not None

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of tokens [N, T]."""
        x = self.block(self.embed(tokens) + self.position, src_mask=self.mask)
        logits: Tensor = self.head(x.mean(1) if self.of_sequence else x)
        return logits


class Residual(nn.Module):
    """Convolutions with batch norm and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 4] of images [N, 1, 8, 8]."""
        x = F.relu(self.stem(x))
        logits: Tensor = self.head(F.relu(x + self.norm(self.inner(x))).mean((2, 3)))
        return logits


class Recurrent(nn.Module):
    """The last state of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 3] of sequences [N, T, 3]."""
        logits: Tensor = self.head(self.gru(x)[0][:, -1])
        return logits


def _mlp(width: int, hidden: int, outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(6, 4),
    )


def _normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


def _classes(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=3.0 * logits).sample()


def _bits(logits: Tensor) -> Tensor:
    return torch.bernoulli((3.0 * logits).sigmoid())


def _real(means: Tensor) -> Tensor:
    return means + NOISE * torch.randn_like(means)


def _of_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.movedim(-1, 1), targets)


def _weighted(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, weight=OF_CLASSES, label_smoothing=0.1)


def _binary(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=POSITIVE)


CLASSES: tuple[Any, ...] = (_classes, F.cross_entropy, "classification")
CASES: dict[str, Case] = {
    "logistic regression": Case(lambda: nn.Linear(12, 4), _normal(80, 12), *CLASSES),
    "MLP, more rows than parameters": Case(_mlp(5, 8, 4), _normal(90, 5), *CLASSES),
    "MLP, more parameters than rows": Case(_mlp(10, 40, 4), _normal(80, 10), *CLASSES),
    "CNN": Case(_cnn, _normal(80, 1, 8, 8), *CLASSES),
    "residual CNN with batch norm": Case(Residual, _normal(80, 1, 8, 8), *CLASSES),
    "GRU": Case(Recurrent, _normal(120, 6, 3), *CLASSES),
    "causal transformer, every token": Case(
        lambda: Tokens(7, None),
        lambda: torch.randint(7, (7, 6)),
        _classes,
        _of_tokens,
        Categorical(class_dim=-1),
    ),
    "regression": Case(_mlp(4, 12, 2), _normal(120, 4), _real, F.mse_loss, Gaussian(sigma=NOISE)),
    "weighted, smoothed cross-entropy": Case(
        *(_mlp(6, 12, 5), _normal(60, 6), _classes, _weighted),
        Categorical(weight=OF_CLASSES, label_smoothing=0.1),
    ),
    "binary, three outputs": Case(
        lambda: Tokens(9, 3),
        lambda: torch.randint(9, (80, 6)),
        _bits,
        _binary,
        Bernoulli(pos_weight=POSITIVE),
    ),
}


@dataclass(frozen=True)
class Trained:
    """A network at its trained weights, and what it was trained on."""

    net: nn.Module
    data: tuple[Tensor, Tensor]

    def computation(self, case: Case, structure: str, precision: float, budget: Budget) -> Computation:
        """Of one λ for all parameters."""
        return Computation(
            structure=structure,
            likelihood=case.likelihood,
            prior_precision=precision,
            batch_size=BATCH,
            budget=budget,
        )


@cache
def trained(name: str) -> Trained:
    """Seeded: the same at every call."""
    case = CASES[name]
    torch.manual_seed(1)
    inputs, teacher = case.inputs(), case.make().double().eval()
    with torch.no_grad():
        targets = case.targets(teacher(inputs))
    net = case.make().double()
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        case.loss(net(inputs), targets).backward()
        optimizer.step()
    return Trained(net.eval(), (inputs, targets))


class OfOneSeed(LanczosRecurrences):
    """The recurrences of one seed's vectors, which take their steps together with those of all the others.

    Each seed stops by its own rules, as alone.

    Args:
        product: See `LanczosRecurrences`.
        starts: Of this seed.
        together: Those of all seeds, in their order.
        index: Of this seed.
    """

    def __init__(
        self, product: Callable[[Tensor], Tensor], starts: Tensor, together: LanczosRecurrences, index: int
    ) -> None:
        super().__init__(product, starts)
        self._together = together
        self._own = slice(index * len(starts), (index + 1) * len(starts))
        if not torch.equal(together.starts[self._own], starts):
            raise ValueError(f"The vectors of seed {index} of these are others.")

    @override
    def extend(self) -> None:
        step = self.num_steps
        if self._together.num_steps == step:
            self._together.extend()
        self._diagonal.append(self._together._diagonal[step][self._own])
        self._beside.append(self._together._beside[step][self._own])
        self._basis.append(self._together._basis[step + 1][:, self._own])


class SideBySide:
    """Takes the place of `LanczosRecurrences` for a number of seeds, one after the other."""

    def __init__(self, seeds: range) -> None:
        self._seeds, self._number = seeds, 0
        self._together: LanczosRecurrences | None = None

    def __call__(self, product: Callable[[Tensor], Tensor], starts: Tensor) -> OfOneSeed:
        """Begin the recurrences of the next seed."""
        if self._together is None:
            numbers = [seed * 2**20 + j for seed in self._seeds for j in range(len(starts))]
            remains = (starts[0] != 0.0).to(starts)  # zero where rows are selected
            self._together = LanczosRecurrences(product, remains * random_signs(numbers, starts[0]))
        self._number += 1
        return OfOneSeed(product, starts, self._together, self._number - 1)


def evaluated(name: str, precision: float, seeds: range) -> dict[str, Any]:
    """The exact value and what each seed says, all from one pass over the data."""
    case, model = CASES[name], trained(name)
    exact = model.computation(case, "full", precision, Budget()).run(model.net, model.data, evidence_of)
    problem = model.computation(case, "lanczos", precision, Budget()).run(
        model.net, model.data, lambda totals: totals.curved.problem
    )
    selected = max(1, round(SELECTED * problem.num_rows))

    def of_seeds(totals: Totals) -> Iterator[list[float]]:
        curved = totals.curved
        if not isinstance(curved, SampledLogDet):
            raise TypeError(f"{type(curved).__name__} has no vectors.")
        # The Newton decrement is no matter of the vectors, and takes longer than they do: that of a slope of zero.
        scaled = totals.dispersion * precision
        still = replace(totals, gradient={n: -scaled * weight for n, weight in totals.weights.items()})
        for seed in seeds:
            curved.problem = replace(curved.problem, seed=seed)
            curved._answers.clear()
            steps: list[str] = []
            curved.problem = replace(curved.problem, report=steps.append)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                evidence = evidence_of(still)
            bounds_hold = evidence.lower <= exact.log_evidence <= evidence.upper
            taken = int(steps[-1].split("step ")[1].split(":")[0])
            yield [
                *(evidence.log_evidence, evidence.log_evidence_stderr, *evidence.interval),
                *(float(bool(caught)), float(bounds_hold), float(taken)),
            ]

    computation = model.computation(case, "lanczos", precision, Budget(selected_rows=selected))
    with mock.patch.object(estimate, "LanczosRecurrences", SideBySide(seeds)):
        of_all = computation.run(model.net, model.data, lambda totals: list(of_seeds(totals)))
    return {
        "parameters": problem.num_parameters,
        "rows": problem.num_rows,
        "selected": selected,
        "exact": exact.log_evidence,
        "seeds": of_all,
    }


def row_of(name: str, precision: float, result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one line."""
    values, stated, low, high, unconverged, hold, steps = (
        list(column) for column in zip(*result["seeds"], strict=True)
    )
    exact, number = result["exact"], len(values)
    bias, spread = statistics.mean(values) - exact, statistics.stdev(values)
    stderr = spread / number**0.5
    inside = [least <= exact <= most for least, most in zip(low, high, strict=True)]
    rms = statistics.mean(error**2 for error in stated) ** 0.5
    return {
        "problem": name,
        **{key: result[key] for key in ("parameters", "rows", "selected")},
        "prior_precision": precision,
        "exact": exact,
        "bias": bias,
        "stderr_of_mean": stderr,
        "deviation": bias / stderr if stderr else 0.0,
        "spread": spread,
        "stated": rms,
        "coverage": sum(inside) / number,
        "seeds": number,
        "unconverged": int(sum(unconverged)),
        "bounds_hold": all(hold),
        "passes": statistics.median(steps),
    }


def failures(row: dict[str, Any]) -> list[str]:
    """What a line does not keep to."""
    wrong = []
    if abs(row["deviation"]) > TOLERANCE:
        wrong.append("mean")
    if not COVERAGE[0] <= row["coverage"] <= COVERAGE[1]:
        wrong.append("coverage")
    if not row["bounds_hold"]:
        wrong.append("bounds")
    return wrong


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the docs."""
    failed = sum(bool(failures(row)) for row in rows)
    fewest = min(row["seeds"] for row in rows)
    lines = [
        f"{len(rows)} lines of {fewest} seeds and more, 8 vectors, float64; **{failed} fail** (mean off by more than "
        f"{TOLERANCE:g} of its standard errors, or a coverage outside {COVERAGE[0]:.0%} to {COVERAGE[1]:.1%}).",
        "",
        "| problem | p | rows (selected) | λ | exact, nats | mean − exact | in its standard errors | spread | stated "
        "| coverage | steps | fails |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['problem']} | {row['parameters']:,} | {row['rows']:,} ({row['selected']}) | "
            f"{row['prior_precision']:g} | {row['exact']:,.3f} | {row['bias']:+.2g} | {row['deviation']:+.2f} | "
            f"{row['spread']:.3g} | {row['stated']:.3g} | {row['coverage']:.1%} | {row['passes']:.0f} | "
            f"{', '.join(failures(row))} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Go on where it stood, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--partial", type=Path, default=Path("lanczos_coverage.json"))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning_bayes").setLevel(logging.WARNING)
    known = json.loads(arguments.partial.read_text()) if arguments.partial.exists() else {}
    # Round by round, so that there is a whole table early.
    for start in range(0, arguments.seeds, ROUND):
        for name in CASES:
            for precision in PRECISIONS:
                key, stop = f"{name}, {precision:g}", min(start + ROUND, arguments.seeds)
                before = known.get(key, {"seeds": []})["seeds"]
                if len(before) >= stop:
                    continue
                result = evaluated(name, precision, range(len(before), stop))
                known[key] = {**result, "seeds": [*before, *result["seeds"]]}
                arguments.partial.write_text(json.dumps(known))
        print(f"{min(start + ROUND, arguments.seeds)} seeds", flush=True)
    rows = [row_of(name, value, known[f"{name}, {value:g}"]) for name in CASES for value in PRECISIONS]
    print(markdown(rows))
    if arguments.write:
        with (FOLDER / "lanczos_coverage.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        (FOLDER / "lanczos_coverage.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

"""(c) Sharpness and exact evidence against batch size at equal training loss (Keskar et al. 2016; Smith & Le)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from examples.smith_le_2018.claims import Claim, above
from examples.smith_le_2018.context import Context
from examples.smith_le_2018.data import Digits, pixels, training_set
from examples.smith_le_2018.engine import BATCH_SEEDS, Run, Trained
from examples.smith_le_2018.intervals import bootstrap, mean_interval, rank_correlation
from examples.smith_le_2018.model import ShuffledBatches, network
from examples.smith_le_2018.plotting import band, batch_axis, figure, log_axis
from examples.smith_le_2018.settled import scores
from examples.smith_le_2018.trials import Kind, Trials
from lightning_bayes import laplace_evidence
from lightning_bayes.loss_curvature.eigenvalue import largest_eigenvalue

__all__ = ["SHARPNESS", "SharpnessSettings", "hessian_trace", "sharpness", "train_to_loss"]

MOMENTUM = 0.9
LOOK_EVERY = 10
"""Steps between two looks at the training loss."""
MOST_STEPS = 20_000
HALVINGS = 30
TOLERANCE = 1e-3
"""Relative, of the eigenvalue."""


@dataclass(frozen=True)
class SharpnessSettings:
    """One net, trained without L2 until its mean training loss is `train_loss`.

    `prior_precision` is that of its evidence alone. `seed` draws training set, initial weights and batches.
    """

    num_examples: int
    hidden: int
    batch_size: int
    learning_rate: float
    target_loss: float
    prior_precision: float
    seed: int


@dataclass(frozen=True)
class SharpnessMeasured:
    """Eigenvalue and trace are of the Hessian of the mean training loss; the evidence is a sum, in nats."""

    steps: int
    train_loss: float
    test_accuracy: float
    test_loss: float
    largest_eigenvalue: float
    eigenvalue_error: float
    trace: float
    log_evidence_ratio: float
    weight_penalty: float
    log_occam_factor: float
    newton_decrement: float


def train_to_loss(net: nn.Sequential, inputs: Tensor, labels: Tensor, run: Run, target: float) -> int:
    """Momentum SGD until the mean training loss is `target`, in place.

    The loss is looked at every few steps. The weights returned lie on the straight line between the last two looks,
    where the loss is the target's: nets of all batch sizes are compared at the same loss, not at one below it.

    Args:
        net: from `network`; changed in place.
        inputs: [N, 784].
        labels: [N].
        run: ε, m, B and the seed of the batches; `steps` is the most that may be taken.
        target: nats per example.

    Returns:
        How many steps it took.

    Raises:
        ValueError: if that loss is not reached.
    """
    trained = Trained(net, inputs, labels, run)
    batches = ShuffledBatches(len(labels), run.batch_size, BATCH_SEEDS + run.seed)
    steps = chain.from_iterable(batches.epoch() for _ in repeat(None))
    before = trained.full_weights()
    for done, indices in enumerate(steps, 1):
        trained.step(indices)
        if done % LOOK_EVERY == 0:
            now = trained.full_weights()
            loss = _loss(trained, inputs, labels, now)
            if loss <= target:
                break
            if done >= run.steps or not math.isfinite(loss):
                raise ValueError(
                    f"Expected a training loss of {target:g} within {run.steps} steps at B = {run.batch_size}, ε ="
                    f" {run.learning_rate:g}, but got {loss:g} after {done}. Take a larger batch or a smaller ε."
                )
            before = now
    with torch.no_grad():
        for part, value in zip(
            net.parameters(), _between(trained, inputs, labels, before, now, target), strict=True
        ):
            part.copy_(value)
    return done


def _between(
    trained: Trained, inputs: Tensor, labels: Tensor, before: list[Tensor], now: list[Tensor], target: float
) -> list[Tensor]:
    """Bisect the line from weights whose loss is above the target to such that are not."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        at = [torch.lerp(first, last, middle) for first, last in zip(before, now, strict=True)]
        low, high = (middle, high) if _loss(trained, inputs, labels, at) > target else (low, middle)
    return [torch.lerp(first, last, high) for first, last in zip(before, now, strict=True)]


def _loss(trained: Trained, inputs: Tensor, labels: Tensor, weights: list[Tensor]) -> float:
    return F.cross_entropy(trained.logits(inputs, weights), labels).item()


def hessian_trace(net: nn.Sequential, inputs: Tensor) -> float:
    """Trace of the Hessian of the mean cross-entropy of a Linear-ReLU-Linear net, exactly.

    Each single weight enters the logits linearly as long as no ReLU switches, so the second derivatives of the logits
    have no diagonal, and the trace is the Gauss-Newton matrix's:

        tr = mean over x of  Σ_c p_c (1 - p_c) · (|h|² + 1)  +  (|x|² + 1) Σ_j [h_j > 0] Var_p(W_·j)

    with h the hidden units, p the probabilities and W [classes, hidden] the output weights.

    Args:
        net: Linear, ReLU, Linear.
        inputs: [N, pixels].

    Returns:
        The trace.
    """
    with torch.no_grad():
        hidden = net[:2](inputs)
        probability = net[2](hidden).softmax(1)
        last = (1 - probability.square().sum(1)) * (hidden.square().sum(1) + 1)
        weights = net[2].weight
        variance = probability @ weights.square() - (probability @ weights).square()
        first = (variance * (hidden > 0)).sum(1) * (inputs.square().sum(1) + 1)
        return (last + first).double().mean().item()


def measure(digits: Digits, settings: SharpnessSettings) -> SharpnessMeasured:
    """Train a net to the loss and look at its curvature there."""
    images, labels = training_set(digits, settings.num_examples, settings.seed)
    inputs = pixels(images)
    net = network(settings.seed, settings.hidden)
    run = Run(
        num_examples=settings.num_examples,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        momentum=MOMENTUM,
        weight_decay=0.0,
        steps=MOST_STEPS,
        seed=settings.seed,
    )
    steps = train_to_loss(net, inputs, labels, run, settings.target_loss)
    top = largest_eigenvalue(net, (inputs, labels), tolerance=TOLERANCE, batch_size=len(labels))
    if not top.converged:
        raise ValueError(f"Expected the largest eigenvalue to converge, but got {top}.")
    evidence = laplace_evidence(
        net, (inputs, labels), structure="full", prior_precision=settings.prior_precision
    )
    test = scores(net, pixels(digits.test_images), digits.test_labels)
    return SharpnessMeasured(
        steps=steps,
        train_loss=scores(net, inputs, labels)[1],
        test_accuracy=test[0],
        test_loss=test[1],
        largest_eigenvalue=top.value,
        eigenvalue_error=top.error,
        trace=hessian_trace(net, inputs),
        log_evidence_ratio=float(evidence.log_evidence_ratio),
        weight_penalty=evidence.weight_penalty,
        log_occam_factor=evidence.log_occam_factor,
        newton_decrement=evidence.newton_decrement,
    )


SHARPNESS = Kind("sharpness", SharpnessSettings, SharpnessMeasured, measure)
"""Its rows are in `sharpness.csv`."""


def sharpness(context: Context) -> list[Claim]:
    """Largest Hessian eigenvalue, trace, exact evidence and test loss against batch size, at one training loss."""
    preset = context.preset.evidence
    trials, sizes = Trials(SHARPNESS, context), list(preset.sharpness_batches)

    def settings(size: int, seed: int) -> SharpnessSettings:
        return SharpnessSettings(
            preset.net_examples,
            preset.net_hidden,
            size,
            preset.sharpness_rate,
            preset.sharpness_loss,
            preset.sharpness_precision,
            seed,
        )

    seeds = trials.measure(
        "sharpness", lambda seed: [settings(size, seed) for size in sizes], preset.net_seeds
    )
    found = {
        column: trials.grid(column, settings, seeds, sizes)
        for column in ("largest_eigenvalue", "trace", "log_evidence_ratio", "test_loss")
    }
    x = np.array(sizes, dtype=float)
    with figure(context.folder / "sharpness.png", columns=3, width=9.0) as (_, (left, middle, right)):
        band(left, x, found["trace"], color="#e07b00", marker="s", label="trace")
        band(left, x, found["largest_eigenvalue"], color="#1f4fd8", label="largest eigenvalue")
        log_axis(left, "y")
        left.set_ylabel("Hessian of the mean training loss")
        left.legend(fontsize=9)
        band(middle, x, found["log_evidence_ratio"], color="#1f4fd8")
        middle.set_ylabel(f"exact log evidence ratio (nats), λ = {preset.sharpness_precision:g}")
        band(right, x, found["test_loss"], color="#444444")
        right.set_ylabel("test cross-entropy (nats per example)")
        for axis in (left, middle, right):
            batch_axis(axis)
    return _claims(x, found, preset.sharpness_loss)


def _claims(x: np.ndarray, found: dict[str, np.ndarray], loss: float) -> list[Claim]:
    at = f"at a training loss of {loss:g}, B from {x[0]:g} to {x[-1]:g}"
    return [
        _slope(x, found["largest_eigenvalue"], "largest Hessian eigenvalue", at),
        _slope(x, found["trace"], "trace of the Hessian", at),
        *_evidence_claims(x, found["log_evidence_ratio"], found["test_loss"], at),
    ]


def _slope(x: np.ndarray, values: np.ndarray, name: str, at: str) -> Claim:
    """Of sharpness against batch size, one a seed."""
    estimate = mean_interval(np.array([stats.linregress(np.log(x), row).slope for row in np.log(values)]))
    return Claim(
        "sharpness",
        "(c) Large batches end in sharper minima (Keskar et al.)",
        f"slope of log {name} against log B, {at}",
        *estimate,
        "> 0",
        above(0.0, *estimate[1:]),
    )


def _evidence_claims(x: np.ndarray, evidence: np.ndarray, test: np.ndarray, at: str) -> list[Claim]:
    """Whether evidence orders the batch sizes as test cross-entropy does."""
    best = int(test.mean(0).argmin())
    gain = mean_interval(evidence[:, best] - evidence[:, -1])
    rank = bootstrap(
        lambda draw: rank_correlation(-evidence[draw].mean(0), test[draw].mean(0)), len(test), 1.0
    )
    return [
        Claim(
            "sharpness",
            "(c) Exact evidence prefers where the better batch size ends",
            f"log evidence ratio at B = {x[best]:g}, of the least test cross-entropy, − at the full batch (nats)",
            *gain,
            "> 0",
            above(0.0, *gain[1:]),
        ),
        Claim(
            "sharpness",
            "(c) Exact evidence orders batch sizes as test cross-entropy does",
            f"rank correlation of −log evidence ratio and test cross-entropy over {len(x)} B, {at}",
            *rank,
            "> 0",
            above(0.0, *rank[1:]),
        ),
    ]

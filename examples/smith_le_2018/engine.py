"""One training run, as fast as a CPU core allows: the sweeps of figures 3 to 7 are thousands of these.

The arithmetic is that of `DigitClassifier` under `torch.optim.SGD`, written out by hand: gradients are added
straight into the momentum buffers, and pixels that are zero in every training image are left out, since their
weights have no gradient. `tests/examples/test_engine.py` holds it to a Lightning run, step by step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.smith_le_2018.data import CLASSES, Digits, pixels, training_set
from examples.smith_le_2018.model import ShuffledBatches, network
from lightning_bayes.functional import sgd_noise_scale

__all__ = ["BATCH_SEEDS", "FINITE_EVERY", "Measurement", "Run", "Trained", "train"]

FINITE_EVERY = 100
"""Steps between two looks whether the weights are still finite."""
BATCH_SEEDS = 1_000_000
"""Added to a run's seed for its batches, so that they are not drawn with the numbers of its training set."""


@dataclass(frozen=True, order=True)
class Run:
    """Every setting of a run; with the digits, they determine its numbers.

    `seed` draws the training set, the initial weights and the batches alike.
    """

    num_examples: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    steps: int
    seed: int

    @property
    def noise_scale(self) -> float:
        """G = ε (N/B - 1)/(1 - m)."""
        return sgd_noise_scale(self.learning_rate, self.batch_size, self.num_examples, self.momentum)


@dataclass(frozen=True)
class Measurement:
    """What a run has reached after some steps; losses are means per example, in nats."""

    step: int
    test_accuracy: float
    test_loss: float
    train_accuracy: float
    train_loss: float


class Trained:
    """The weights of the net and their momentum, and the step that changes both.

    Args:
        net: from `network`; it is not changed.
        inputs: [N, 784], the training set.
        labels: [N].
        run: the settings.
    """

    def __init__(self, net: nn.Sequential, inputs: Tensor, labels: Tensor, run: Run) -> None:
        first, last = net[0], net[-1]
        # Weight decay moves weights that have no gradient too.
        self.live = (inputs != 0).any(0) | (run.weight_decay > 0)
        self.run = run
        self.frozen = first.weight.detach().to(inputs.dtype)
        self.inputs = inputs[:, self.live].contiguous()
        self.targets = F.one_hot(labels, CLASSES).to(inputs.dtype)
        start = (self.frozen[:, self.live], first.bias, last.weight, last.bias)
        self.weights = [part.detach().to(inputs.dtype).clone() for part in start]
        self.buffers = [torch.zeros_like(part) for part in self.weights]

    def step(self, indices: Tensor) -> None:
        """One step of momentum SGD: v ← m v + ∇L + wd ω, then ω ← ω - ε v."""
        inputs, run = self.inputs[indices], self.run
        first, first_bias, last, last_bias = self.weights
        hidden = torch.addmm(first_bias, inputs, first.t()).relu_()
        logits = torch.addmm(last_bias, hidden, last.t())
        delta = logits.softmax(1).sub_(
            self.targets[indices]
        )  # B times the mean loss's gradient in the logits
        hidden_delta = (delta @ last).mul_(hidden > 0)
        share = 1 / len(indices)
        for (weight, bias), signal, source in (
            (self.buffers[2:], delta, hidden),
            (self.buffers[:2], hidden_delta, inputs),
        ):
            weight.addmm_(signal.t(), source, beta=run.momentum, alpha=share)
            bias.mul_(run.momentum).add_(signal.sum(0), alpha=share)
        for part, buffer in zip(self.weights, self.buffers, strict=True):
            if run.weight_decay:
                buffer.add_(part, alpha=run.weight_decay)
            part.sub_(buffer, alpha=run.learning_rate)

    def finite(self) -> bool:
        """Whether the output layer is; whatever overflows elsewhere arrives there at the next step."""
        return bool(torch.isfinite(self.weights[2].sum()))

    def full_weights(self) -> list[Tensor]:
        """All four parameters in the shapes of the net, the weights of dead pixels included."""
        first = self.frozen.clone()
        first[:, self.live] = self.weights[0]
        return [first, *(part.clone() for part in self.weights[1:])]

    def logits(self, inputs: Tensor, weights: list[Tensor]) -> Tensor:
        """Outputs of the net, [n, 10]."""
        return F.linear(F.linear(inputs, *weights[:2]).relu_(), *weights[2:])


def train(digits: Digits, run: Run, measure_at: Iterable[int] = ()) -> list[Measurement]:
    """Train one net and measure it.

    Args:
        digits: where the training set is drawn from, and the test set.
        run: the settings.
        measure_at: steps after which to measure, beside the last.

    Returns:
        Measurements by step. A run whose weights overflow ends there; its later measurements are those of a net that
        guesses one class, with infinite losses.
    """
    images, labels = training_set(digits, run.num_examples, run.seed)
    trained = Trained(network(run.seed), pixels(images), labels, run)
    train_part = pixels(images), labels
    test_part = pixels(digits.test_images), digits.test_labels
    moments = sorted({step for step in measure_at if step < run.steps} | {run.steps})
    found: list[Measurement] = []
    finite = True
    done = 0
    steps = _steps(run)
    for moment in moments:
        while finite and done < moment:
            stretch = min(moment - done, FINITE_EVERY)
            for indices in islice(steps, stretch):
                trained.step(indices)
            done += stretch
            finite = trained.finite()
        found.append(_measure(trained, moment, train_part, test_part))
    return found


def _steps(run: Run) -> Iterator[Tensor]:
    """Batches without end, epoch after epoch."""
    batches = ShuffledBatches(run.num_examples, run.batch_size, BATCH_SEEDS + run.seed)
    while True:
        yield from batches.epoch()


def _measure(
    trained: Trained, step: int, train_part: tuple[Tensor, Tensor], test_part: tuple[Tensor, Tensor]
) -> Measurement:
    weights = trained.full_weights()
    numbers: list[float] = []
    for inputs, labels in (test_part, train_part):
        logits = trained.logits(inputs, weights)
        if logits.isfinite().all():
            loss = F.cross_entropy(logits, labels).item()
        else:
            logits, loss = torch.zeros_like(logits), math.inf
        numbers += [(logits.argmax(1) == labels).double().mean().item(), loss]
    return Measurement(step, *numbers)

"""Logistic regression of digits 0 and 1, as in the paper's figures 1 and 2: draw, fit, measure.

Cost: C(ω) = -Σ ln P(y | ω, x) + ½ λ |ω|², with ω the 784 weights and the bias. It is convex; its curvature is the
Gauss-Newton matrix, so that nothing but Laplace's own approximation stands between ω and the evidence.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
from scipy import optimize, special
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.smith_le_2018.data import PIXELS, Digits, pixels
from examples.smith_le_2018.trials import Kind
from lightning_bayes import Evidence, LaplaceEvidence, laplace_evidence

__all__ = [
    "CONVERGED",
    "LOGISTIC",
    "LogisticSettings",
    "TwoDigits",
    "cost_and_derivatives",
    "design_of",
    "fit",
    "linear",
    "two_digits",
]

TEST_PER_DIGIT = 5000
CONVERGED = 1e-6
"""Newton decrement in nats below which a fit counts as converged."""
DRAW_SEEDS = 2_000_000
"""Added to a seed for the draw of images, and twice for the random labels."""
LIGHTNING_STEPS = 800


@dataclass(frozen=True)
class LogisticSettings:
    """One fit.

    `labels` is "true", or "random": fair coins for training and test images alike. `fit_by` is "newton", a trust
    region with the exact Hessian, or "lightning": a Trainer with full-batch SGD, weight_decay = λ/N, and the
    LaplaceEvidence callback. `seed` draws images and coins.
    """

    num_examples: int
    labels: str
    prior_precision: float
    fit_by: str
    seed: int


@dataclass(frozen=True)
class LogisticMeasured:
    """Losses are means per example, the evidence and its parts are sums, in nats."""

    num_test: int
    train_accuracy: float
    test_accuracy: float
    train_loss: float
    test_loss: float
    log_evidence_ratio: float
    weight_penalty: float
    log_occam_factor: float
    effective_parameters: float
    newton_decrement: float


@dataclass(frozen=True)
class TwoDigits:
    """Images of zeros and ones as inputs [n, 784] in float64, labels [n] in {0, 1}."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def two_digits(digits: Digits, num_examples: int, labels: str, seed: int) -> TwoDigits:
    """Balanced training and test sets, drawn from the train and test images pooled.

    Args:
        digits: as `load_digits` gives them.
        num_examples: N, half of them zeros.
        labels: "true" or "random".
        seed: of the draw.

    Returns:
        N training images, and of what is left at most 10,000 test images.

    Raises:
        ValueError: if there are too few digits, or for other labels.
    """
    if labels not in ("true", "random"):
        raise ValueError(f'Expected argument `labels` to be "true" or "random", but got {labels!r}.')
    images = torch.cat([digits.train_images, digits.test_images])
    classes = torch.cat([digits.train_labels, digits.test_labels])
    generator = torch.Generator().manual_seed(DRAW_SEEDS + seed)
    places = [torch.nonzero(classes == digit)[:, 0] for digit in (0, 1)]
    size = num_examples // 2
    test_size = min(TEST_PER_DIGIT, *(len(place) - size for place in places))
    if size < 1 or test_size < 1:
        raise ValueError(
            f"Expected argument `num_examples` to be from 2 to {2 * (size + test_size - 1)}, so that {digits.name}"
            f" has zeros and ones left for the test set, but got {num_examples}."
        )
    places = [place[torch.randperm(len(place), generator=generator)] for place in places]
    train = torch.cat([place[:size] for place in places])
    test = torch.cat([place[size : size + test_size] for place in places])
    parts: list[Tensor] = []
    coins = torch.Generator().manual_seed(2 * DRAW_SEEDS + seed)
    for chosen in (train, test):
        truth = classes[chosen]
        drawn = truth if labels == "true" else torch.randint(2, truth.shape, generator=coins)
        parts += [pixels(images[chosen], torch.float64), drawn.double()]
    return TwoDigits(*parts)


def fit(inputs: Tensor, labels: Tensor, prior_precision: float) -> Tensor:
    """The minimum of the cost, by scipy's trust region method with the exact Hessian, from zero.

    Args:
        inputs: [N, p - 1], float64.
        labels: [N], 0 or 1.
        prior_precision: λ.

    Returns:
        The weights, and the bias last, [p].
    """
    design, signs = design_of(inputs), 2 * labels.numpy() - 1

    def cost(weights: np.ndarray) -> float:
        # ln σ(z), which does not underflow where σ does
        return float(
            -special.log_expit(signs * (design @ weights)).sum() + prior_precision / 2 * weights @ weights
        )

    def gradient(weights: np.ndarray) -> np.ndarray:
        return cost_and_derivatives(weights, design, labels.numpy(), prior_precision)[0]

    def hessian(weights: np.ndarray) -> np.ndarray:
        return cost_and_derivatives(weights, design, labels.numpy(), prior_precision)[1]

    start = np.zeros(design.shape[1])
    # No status is asked for: near the minimum the cost no longer moves in float64, which the method calls a failure.
    # The Newton decrement says how far the minimum is.
    options = {"gtol": 1e-9, "initial_trust_radius": 10.0, "max_trust_radius": 1e6, "maxiter": 200}
    found = optimize.minimize(cost, start, jac=gradient, hess=hessian, method="trust-exact", options=options)
    return torch.from_numpy(found.x)


def cost_and_derivatives(
    weights: np.ndarray, design: np.ndarray, labels: np.ndarray, prior_precision: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient [p] and Hessian [p, p] of the cost.

    Args:
        weights: [p].
        design: [N, p], a last column of ones.
        labels: [N], 0 or 1.
        prior_precision: λ.

    Returns:
        (∇C, ∇²C).
    """
    probability = special.expit(design @ weights)
    gradient = design.T @ (probability - labels) + prior_precision * weights
    hessian = (design.T * (probability * (1 - probability))) @ design
    hessian[np.diag_indices_from(hessian)] += prior_precision
    return gradient, hessian


def linear(weights: Tensor) -> nn.Linear:
    """The regression as a module from pixels [B, 784] to one logit [B, 1], in float64."""
    module = nn.Linear(len(weights) - 1, 1, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(weights[:-1])
        module.bias.copy_(weights[-1:])
    return module


class LogisticRegression(L.LightningModule):
    """The same as a LightningModule: full-batch SGD from zero, its weight decay the prior."""

    def __init__(self, weight_decay: float, learning_rate: float = 0.1, momentum: float = 0.95) -> None:
        super().__init__()
        self.net = linear(torch.zeros(PIXELS + 1, dtype=torch.float64))
        self.settings = {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.binary_cross_entropy_with_logits(self.net(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.settings)


def by_lightning(data: TwoDigits, prior_precision: float) -> tuple[nn.Linear, Evidence]:
    """Fit by a Trainer, and the evidence that its callback reports at the end."""
    module = LogisticRegression(prior_precision / len(data.train_labels))
    # No shuffle: the one batch is the whole training set.
    loader = DataLoader(TensorDataset(data.train_inputs, data.train_labels[:, None]), len(data.train_labels))
    evidence = LaplaceEvidence(structure="full", every_n_epochs=LIGHTNING_STEPS)
    with _quiet("lightning.pytorch"):
        trainer = L.Trainer(
            max_epochs=LIGHTNING_STEPS,
            accelerator="cpu",
            callbacks=[evidence],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit(module, loader)
    return module.net, evidence.history[-1][1]


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the lines that a Trainer prints for each of many runs."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning's own use of a class that torch has since deprecated, and its advice on loaders.
            warnings.filterwarnings("ignore", message=".*(LeafSpec|does not have many workers).*")
            yield
    finally:
        logger.setLevel(level)


def measure(digits: Digits, settings: LogisticSettings) -> LogisticMeasured:
    """Draw, fit and measure."""
    data = two_digits(digits, settings.num_examples, settings.labels, settings.seed)
    if settings.fit_by == "lightning":
        module, evidence = by_lightning(data, settings.prior_precision)
    else:
        module = linear(fit(data.train_inputs, data.train_labels, settings.prior_precision))
        pair = data.train_inputs, data.train_labels[:, None]
        evidence = laplace_evidence(
            module,
            pair,
            likelihood="binary",
            structure="full",
            prior_precision=settings.prior_precision,
            batch_size=len(pair[0]),
        )
    train, test = (_scores(module, *part) for part in _parts(data))
    return LogisticMeasured(
        num_test=len(data.test_labels),
        train_accuracy=train[0],
        test_accuracy=test[0],
        train_loss=train[1],
        test_loss=test[1],
        log_evidence_ratio=float(evidence.log_evidence_ratio),
        weight_penalty=evidence.weight_penalty,
        log_occam_factor=evidence.log_occam_factor,
        effective_parameters=evidence.effective_parameters,
        newton_decrement=evidence.newton_decrement,
    )


def _parts(data: TwoDigits) -> list[tuple[Tensor, Tensor]]:
    return [(data.train_inputs, data.train_labels), (data.test_inputs, data.test_labels)]


def _scores(module: nn.Linear, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    with torch.no_grad():
        logits = module(inputs)[:, 0]
    right = ((logits > 0) == (labels > 0.5)).double().mean().item()
    return right, F.binary_cross_entropy_with_logits(logits, labels).item()


def design_of(inputs: Tensor) -> np.ndarray:
    """Inputs with a last column of ones, for the bias."""
    return np.hstack([inputs.numpy(), np.ones((len(inputs), 1))])


LOGISTIC = Kind("logistic", LogisticSettings, LogisticMeasured, measure)
"""Its rows are in `logistic.csv`."""

"""The paper's net trained until it has settled at a minimum of the cost with L2, where Laplace expands.

Momentum SGD would need 1/weight_decay time constants for the weights that the data do not determine to shrink. The
minimum is what is asked for, so L-BFGS on the whole training set looks for it, from PyTorch's initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.smith_le_2018.data import CLASSES, Digits, pixels, training_set
from examples.smith_le_2018.model import network
from examples.smith_le_2018.trials import Kind
from lightning_bayes import laplace_evidence

__all__ = ["COIN_SEEDS", "NETS", "SETTLED", "STRUCTURES", "NetSettings", "decrement_bound", "settle"]

STRUCTURES = ("full", "kron", "diag")
COIN_SEEDS = 3_000_000
"""Added to a seed for its random labels."""
SETTLED = 1.0
"""Nats of Newton decrement, certified by the bound, at which the search ends. The kinks of the ReLU make the
last nat slow."""
ROUNDS, ITERATIONS = 4, 100
HISTORY = 20


@dataclass(frozen=True)
class NetSettings:
    """One net. `labels` is "true" or "random"; `seed` draws training set, initial weights and random labels."""

    num_examples: int
    hidden: int
    labels: str
    prior_precision: float
    seed: int


@dataclass(frozen=True)
class NetMeasured:
    """Losses are means per example; evidences are sums, in nats."""

    train_accuracy: float
    test_accuracy: float
    train_loss: float
    test_loss: float
    iterations: int
    decrement_bound: float
    newton_decrement: float
    log_evidence_ratio: float
    weight_penalty: float
    log_occam_factor: float
    effective_parameters: float
    kron_log_evidence_ratio: float
    diag_log_evidence_ratio: float


def settle(
    net: nn.Module, inputs: Tensor, labels: Tensor, prior_precision: float, rounds: int = ROUNDS
) -> int:
    """Minimise C(ω) = Σ cross-entropy + ½ λ |ω|² in place, by torch's L-BFGS with a strong Wolfe search.

    Args:
        net: changed in place.
        inputs: [N, ...].
        labels: [N].
        prior_precision: λ.
        rounds: at most so many hundred iterations; fewer once the Newton decrement is certainly small.

    Returns:
        How many iterations it took.
    """
    parameters = list(net.parameters())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=ITERATIONS,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        squares = sum((part.square().sum() for part in parameters), torch.zeros(()))
        # Per example, so that the first step, of length min(1, 1/|∇|₁), is not too small.
        cost = F.cross_entropy(net(inputs), labels) + prior_precision / (2 * len(labels)) * squares
        cost.backward()
        return cost.detach()

    taken = 0
    for _ in range(rounds):
        optimizer.step(closure)
        taken += ITERATIONS
        if decrement_bound(net, inputs, labels, prior_precision) < SETTLED:
            break
    return taken


def decrement_bound(net: nn.Module, inputs: Tensor, labels: Tensor, prior_precision: float) -> float:
    """No Newton decrement is larger: ½ ∇Cᵀ(G + λ)⁻¹∇C ≤ |∇C|²/2λ.

    Args:
        net: the model.
        inputs: [N, ...].
        labels: [N].
        prior_precision: λ.

    Returns:
        The bound, in nats.
    """
    parameters = list(net.parameters())
    loss = F.cross_entropy(net(inputs), labels, reduction="sum")
    slopes = torch.autograd.grad(loss, parameters)
    total = sum(
        (slope + prior_precision * part.detach()).square().sum().item()
        for slope, part in zip(slopes, parameters, strict=True)
    )
    return total / (2 * prior_precision)


def measure(digits: Digits, settings: NetSettings) -> NetMeasured:
    """Train a net until it has settled, then ask for its evidence by every structure."""
    images, truth = training_set(digits, settings.num_examples, settings.seed)
    inputs, labels = pixels(images), truth
    test_labels = digits.test_labels
    if settings.labels == "random":
        coins = torch.Generator().manual_seed(COIN_SEEDS + settings.seed)
        labels = torch.randint(CLASSES, truth.shape, generator=coins)
        test_labels = torch.randint(CLASSES, test_labels.shape, generator=coins)
    net = network(settings.seed, settings.hidden)
    with torch.no_grad():
        # Weights of pixels that are zero throughout: the prior alone acts on them, and their minimum is known.
        net[0].weight[:, (inputs == 0).all(0)] = 0.0
    iterations = settle(net, inputs, labels, settings.prior_precision)
    found = {
        structure: laplace_evidence(
            net, (inputs, labels), structure=structure, prior_precision=settings.prior_precision
        )
        for structure in STRUCTURES
    }
    exact = found["full"]
    train, test = scores(net, inputs, labels), scores(net, pixels(digits.test_images), test_labels)
    return NetMeasured(
        train_accuracy=train[0],
        test_accuracy=test[0],
        train_loss=train[1],
        test_loss=test[1],
        iterations=iterations,
        decrement_bound=decrement_bound(net, inputs, labels, settings.prior_precision),
        newton_decrement=exact.newton_decrement,
        log_evidence_ratio=float(exact.log_evidence_ratio),
        weight_penalty=exact.weight_penalty,
        log_occam_factor=exact.log_occam_factor,
        effective_parameters=exact.effective_parameters,
        kron_log_evidence_ratio=float(found["kron"].log_evidence_ratio),
        diag_log_evidence_ratio=float(found["diag"].log_evidence_ratio),
    )


def scores(net: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in nats."""
    with torch.no_grad():
        logits = net(inputs)
    return (logits.argmax(1) == labels).double().mean().item(), F.cross_entropy(logits, labels).item()


NETS = Kind("nets", NetSettings, NetMeasured, measure)
"""Its rows are in `nets.csv`."""

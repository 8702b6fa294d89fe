"""Models and losses as data: what the evidence engine is held against its slow twin on.

Everything is float64 and seeded. Each network takes the number of outputs and is small enough for a dense
Jacobian, yet has one thing that breaks a lesser engine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bayes.curvature.likelihoods import Gaussian, Likelihood
from lightning_bayes.evidence import Evidence
from lightning_bayes.laplace import laplace_evidence
from tests.reference import Reference, reference_evidence


class FunctionalConv(nn.Module):
    """Strides, paddings and groups; activations and pooling as functions."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, (1, 2), padding=(0, 1), groups=2, bias=False)
        self.head = nn.Linear(4, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.head(F.gelu(self.second(x)).mean((2, 3)))


class Residual(nn.Module):
    """Sums and in-place operations between the layers."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 4)
        self.inner = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.inner(x)
        y += x
        y.mul_(0.7)
        y = self.relu(y)
        out = self.head(y)
        out *= 1.5
        return out


class SharedWeight(nn.Module):
    """Two layers, one weight, a bias each."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.one = nn.Linear(5, 5)
        self.two = nn.Linear(5, 5)
        self.two.weight = self.one.weight
        self.head = nn.Linear(5, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class CalledTwice(nn.Module):
    """One layer, two steps of a recurrence."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.step = nn.Linear(5, 5)
        self.head = nn.Linear(5, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.step(torch.tanh(self.step(x)))))


class Sequence(nn.Module):
    """A linear layer at every position of [N, T, d], then their mean."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 3)
        self.head = nn.Linear(3, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)).mean(1))


class Unpooled(nn.Module):
    """A layer whose output misses the loss beside one that makes it."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.unused = nn.Linear(5, 2)
        self.aside = nn.Linear(5, 1)
        self.head = nn.Linear(5, num_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.head(x)


def linear(num_outputs: int) -> nn.Module:
    return nn.Linear(5, num_outputs)


def mlp(num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, num_outputs))


def dropout(num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(6, num_outputs))


def batch_norm(num_outputs: int) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 9, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, num_outputs),
    )
    for module in net.modules():  # running statistics and an affine map that are not the identity
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, 0.4, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net


def conv1d(num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=2, dilation=2),
        nn.Tanh(),
        nn.ConvTranspose1d(3, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(24, num_outputs),
    )


def transposed(num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, num_outputs),
    )


def padded(num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 2, 3, padding="same", dilation=2),
        nn.Tanh(),
        nn.Conv2d(2, 2, (2, 3), padding=(1, 2), padding_mode="circular"),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, num_outputs),
    )


@dataclass(frozen=True)
class Network:
    """A factory, and the shape of one input."""

    make: Callable[[int], nn.Module]
    shape: tuple[int, ...] = (5,)


NETWORKS: dict[str, Network] = {
    "linear": Network(linear),
    "mlp": Network(mlp),
    "conv": Network(FunctionalConv, (2, 5, 4)),
    "batch_norm": Network(batch_norm, (2, 4, 4)),
    "residual": Network(Residual),
    "dropout": Network(dropout),
    "shared_weight": Network(SharedWeight),
    "called_twice": Network(CalledTwice),
    "sequence": Network(Sequence, (3, 4)),
    "unpooled": Network(Unpooled),
    "conv1d": Network(conv1d, (2, 6)),
    "transposed": Network(transposed, (2, 3, 3)),
    "padded": Network(padded, (2, 4, 4)),
}


@dataclass(frozen=True)
class Loss:
    """A task by the engine's name, with targets that fit it."""

    task: str
    num_outputs: int
    targets: Callable[[int, int], Tensor]
    sigma: float | None = None

    @property
    def likelihood(self) -> str | Likelihood:
        """What a user would pass."""
        return Gaussian(self.sigma) if self.sigma is not None else self.task


def _class_indices(num_examples: int, num_outputs: int) -> Tensor:
    return torch.randint(num_outputs, (num_examples,))


def _class_probabilities(num_examples: int, num_outputs: int) -> Tensor:
    return torch.rand(num_examples, num_outputs, dtype=torch.float64).softmax(1)


def _binary(num_examples: int, num_outputs: int) -> Tensor:
    return torch.randint(2, (num_examples, num_outputs)).double()


def _real(num_examples: int, num_outputs: int) -> Tensor:
    return torch.randn(num_examples, num_outputs, dtype=torch.float64)


LOSSES: dict[str, Loss] = {
    "classification": Loss("classification", 4, _class_indices),
    "class_probabilities": Loss("classification", 3, _class_probabilities),
    "binary": Loss("binary", 1, _binary),
    "binary_3": Loss("binary", 3, _binary),
    "regression_given_noise": Loss("regression", 2, _real, sigma=0.3),
    "regression": Loss("regression", 2, _real),
}


@dataclass(frozen=True)
class Case:
    """One model with its data, ready to be asked for its evidence."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Loss

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return [name for name, _ in self.model.named_parameters()]

    def evidence(self, **arguments: Any) -> Evidence:
        """The engine's answer, from batches of three: several, and the last one incomplete."""
        arguments = {"likelihood": self.loss.likelihood, "batch_size": 3} | arguments
        return laplace_evidence(self.model, (self.inputs, self.targets), **arguments)

    def reference(self, precision: float | dict[str, float], structure: str = "full") -> Reference:
        """The literal answer."""
        if not isinstance(precision, dict):
            precision = dict.fromkeys(self.names, precision)
        return reference_evidence(
            self.model,
            self.inputs,
            self.targets,
            self.loss.task,
            precision,
            sigma=self.loss.sigma,
            structure=structure,
        )


def make_case(network: str = "mlp", loss: str = "classification", num_examples: int = 7) -> Case:
    """The same case at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        kind, target = NETWORKS[network], LOSSES[loss]
        model = kind.make(target.num_outputs).double()
        inputs = torch.randn(num_examples, *kind.shape, dtype=torch.float64)
        return Case(model, inputs, target.targets(num_examples, target.num_outputs), target)

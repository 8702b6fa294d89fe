"""Losses as data: what a user would pass, targets that fit, and the literal density that is meant."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bayes import likelihoods
from lightning_bayes.likelihoods import Likelihood
from tests.reference import Density

CLASS_WEIGHTS = torch.tensor([0.3, 2.0, 1.1, 0.7], dtype=torch.float64)
OUTPUT_WEIGHTS = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64)
POSITIVE_WEIGHTS = torch.tensor([3.0, 0.5, 1.2], dtype=torch.float64)


@dataclass(frozen=True)
class Loss:
    """A task, and what PyTorch's loss of it takes.

    Attributes:
        task: The engine's name for it; of a likelihood class where it has `options`.
        num_outputs: That it is tried with.
        targets: From the outputs' shape and the dimension of the classes.
        sigma: Noise of a regression, None to estimate it.
        options: Of `F.cross_entropy`, `F.binary_cross_entropy_with_logits` and the likelihood alike.
        head: Follows the network.
    """

    task: str
    num_outputs: int
    targets: Callable[[torch.Size, int], Tensor]
    sigma: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    head: Callable[[], nn.Module] | None = None

    def likelihood(self, class_dim: int = 1) -> str | Likelihood:
        """What a user would pass."""
        options = dict(self.options)
        if self.task == "classification" and class_dim != 1:
            options["class_dim"] = class_dim
        if self.sigma is not None:
            options["sigma"] = self.sigma
        name = {
            "classification": "Categorical",
            "binary": "Bernoulli",
            "regression": "Gaussian",
            "variances": "HeteroscedasticGaussian",
        }[self.task]
        return (
            self.task if not options and self.task != "variances" else getattr(likelihoods, name)(**options)
        )

    def density(self, class_dim: int = 1) -> str | Density:
        """What the reference takes: PyTorch's summed loss, for the plain ones torch.distributions."""
        if self.task == "variances":
            return Density(gaussian_nll, guess=False, targets_of_fisher=one_sigma_apart)
        if self.task == "binary" and self.options:
            return Density(self._binary)
        if self.task == "classification" and (self.options or class_dim != 1):
            return Density(lambda f, y: self._classes(f.movedim(class_dim, 1), y, class_dim))
        return self.task

    def _binary(self, f: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(f, y, reduction="sum", **self.options)

    def _classes(self, f: Tensor, y: Tensor, class_dim: int) -> Tensor:
        y = y.movedim(class_dim, 1) if y.is_floating_point() else y
        return F.cross_entropy(f, y, reduction="sum", **self.options)


def gaussian_nll(f: Tensor, y: Tensor) -> Tensor:
    """Minus the log-density under K means, then K variances."""
    mean, variance = f.chunk(2, dim=1)
    return F.gaussian_nll_loss(mean, y.reshape(mean.shape), variance, full=True, eps=0.0, reduction="sum")


def one_sigma_apart(f: Tensor) -> list[Tensor]:
    """Two targets with the model's mean and variance: the Hessian is quadratic in the target."""
    mean, variance = f.chunk(2, dim=1)
    return [mean - variance.sqrt(), mean + variance.sqrt()]


class PositiveVariances(nn.Module):
    """Makes the second half of the outputs variances."""

    def forward(self, x: Tensor) -> Tensor:
        mean, raw = x.chunk(2, dim=1)
        return torch.cat([mean, 0.1 + F.softplus(raw)], dim=1)


def _class_indices(shape: torch.Size, class_dim: int) -> Tensor:
    positions = list(shape)
    num_classes = positions.pop(class_dim)
    return torch.randint(num_classes, positions)


def _some_ignored(shape: torch.Size, class_dim: int) -> Tensor:
    """Every fourth target, and a whole example."""
    indices = _class_indices(shape, class_dim)
    indices.view(-1)[::4] = -100
    indices[2] = -100
    return indices


def _class_probabilities(shape: torch.Size, class_dim: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64).softmax(class_dim)


def _binary(shape: torch.Size, class_dim: int) -> Tensor:
    return torch.randint(2, shape).double()


def _real(shape: torch.Size, class_dim: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _real_beside_variances(shape: torch.Size, class_dim: int) -> Tensor:
    return torch.randn(shape[0], shape[1] // 2, dtype=torch.float64)


def _weighted(**options: Any) -> dict[str, Any]:
    return {"weight": CLASS_WEIGHTS} | options


LOSSES: dict[str, Loss] = {
    "classification": Loss("classification", 4, _class_indices),
    "class_probabilities": Loss("classification", 3, _class_probabilities),
    "binary": Loss("binary", 1, _binary),
    "binary_3": Loss("binary", 3, _binary),
    "regression_given_noise": Loss("regression", 2, _real, sigma=0.3),
    "regression": Loss("regression", 2, _real),
    "weighted": Loss("classification", 4, _class_indices, options=_weighted()),
    "smoothed": Loss("classification", 4, _class_indices, options={"label_smoothing": 0.2}),
    "weighted_smoothed": Loss("classification", 4, _class_indices, options=_weighted(label_smoothing=0.1)),
    "weighted_probabilities": Loss(
        "classification", 4, _class_probabilities, options=_weighted(label_smoothing=0.1)
    ),
    "ignored": Loss("classification", 4, _some_ignored, options={"ignore_index": -100}),
    "ignored_weighted_smoothed": Loss(
        "classification", 4, _some_ignored, options=_weighted(label_smoothing=0.1, ignore_index=-100)
    ),
    "binary_pos_weight": Loss("binary", 3, _binary, options={"pos_weight": POSITIVE_WEIGHTS}),
    "binary_weighted": Loss(
        "binary", 3, _binary, options={"weight": OUTPUT_WEIGHTS, "pos_weight": POSITIVE_WEIGHTS}
    ),
    "gaussian_nll": Loss("variances", 4, _real_beside_variances, head=PositiveVariances),
}

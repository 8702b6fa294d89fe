"""Densities whose Fisher information is known: those of torch.distributions, and PyTorch's losses that stand for one.

The information of one variable in its parameters, E[∇ ln p ∇ ln pᵀ] over variables that it would draw itself. It does
not depend on the target, and has no negative eigenvalue where the Hessian at a target may have one.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, distributions
from torch.nn import functional as F

from lightning_bayes.capture.pytorch_losses import LossCall
from lightning_bayes.numerics.expected_values import expected_over_counts

Matrix = list[list[Tensor | float]]


@dataclass(frozen=True)
class Density:
    """One evaluation of log-densities, or of a loss that is minus their sum or mean.

    Attributes:
        name: As users write it.
        result: What was returned.
        sign: −1 for a log-density, 1 for a loss.
        parameters: Of the distribution, in the shape of its batch; one vector of each, [..., C], where `vector`.
        information: Fisher's, entries [..., P, P] in these.
        constant: What the loss leaves out of minus the log-density, summed over all that was evaluated with weight 1;
            a tensor of each, 0 for nothing.
        share: Of each term in `result` where that is reduced: 1, or 1 over their number.
    """

    name: str
    result: Tensor
    sign: float
    parameters: list[Tensor]
    information: Tensor
    vector: bool = False
    constant: Tensor | float = 0.0
    share: float = 1.0

    @property
    def shape(self) -> torch.Size:
        """Of the batch of independent variables."""
        return self.information.shape[:-2]

    def has_targets_of_its_own(self, num_examples: int | None) -> bool:
        """Whether no variable was evaluated at the targets of all examples: [N, 1] beside [N] is [N, N]."""
        evaluated = self.result.shape
        if len(evaluated) < len(self.shape):  # reduced
            return True
        more = len(evaluated) - len(self.shape)
        return evaluated[more:] == self.shape and num_examples not in evaluated[:more]


def _normal(d: Any) -> Matrix:
    precision = d.scale**-2
    return [[precision, 0.0], [0.0, 2 * precision]]


def _laplace(d: Any) -> Matrix:
    precision = d.scale**-2
    return [[precision, 0.0], [0.0, precision]]


def _student_t(d: Any) -> Matrix:
    """Lange, Little & Taylor, *Robust statistical modeling using the t distribution*, JASA 84, 1989."""
    nu, scale = d.df, d.scale
    half = torch.polygamma(1, nu / 2) - torch.polygamma(1, (nu + 1) / 2)
    of_nu = half / 4 - (nu + 5) / (2 * nu * (nu + 1) * (nu + 3))
    mixed = -2 / (scale * (nu + 1) * (nu + 3))
    return [
        [of_nu, 0.0, mixed],
        [0.0, (nu + 1) / ((nu + 3) * scale**2), 0.0],
        [mixed, 0.0, 2 * nu / ((nu + 3) * scale**2)],
    ]


def _gamma(d: Any) -> Matrix:
    mixed = -1 / d.rate
    return [[torch.polygamma(1, d.concentration), mixed], [mixed, d.concentration / d.rate**2]]


def _negative_binomial(d: Any) -> Matrix:
    """By a sum over counts for the number of failures, whose information has no closed form."""
    count, logits, p = d.total_count, d.logits, torch.sigmoid(d.logits)
    if not count.requires_grad:
        return [[0.0, 0.0], [0.0, count * p]]

    def log_density(y: Tensor) -> Tensor:
        constant = torch.lgamma(count + y) - torch.lgamma(y + 1) - torch.lgamma(count)
        density: Tensor = constant + count * F.logsigmoid(-logits) + y * F.logsigmoid(logits)
        return density

    expected: Tensor = expected_over_counts(log_density, lambda y: torch.polygamma(1, count + y), count)
    return [[torch.polygamma(1, count) - expected, p], [p, count * p]]


TABLE: dict[type, tuple[tuple[str, ...], Callable[[Any], Matrix]]] = {
    distributions.Normal: (("loc", "scale"), _normal),
    distributions.Laplace: (("loc", "scale"), _laplace),
    distributions.StudentT: (("df", "loc", "scale"), _student_t),
    distributions.Gamma: (("concentration", "rate"), _gamma),
    distributions.Poisson: (("rate",), lambda d: [[1 / d.rate]]),
    distributions.Exponential: (("rate",), lambda d: [[d.rate**-2]]),
    distributions.Geometric: (("probs",), lambda d: [[1 / (d.probs**2 * (1 - d.probs))]]),
    distributions.Bernoulli: (("logits",), lambda d: [[torch.sigmoid(d.logits) * torch.sigmoid(-d.logits)]]),
    distributions.NegativeBinomial: (("total_count", "logits"), _negative_binomial),
}
"""By class: the parameters that `log_prob` computes with, and the entries of their Fisher information."""


def _softmax_information(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    own: Tensor = torch.diag_embed(p)
    return own - p.unsqueeze(-1) * p.unsqueeze(-2)


def _dirichlet_information(concentration: Tensor) -> Tensor:
    own: Tensor = torch.diag_embed(torch.polygamma(1, concentration))
    return own - torch.polygamma(1, concentration.sum(-1))[..., None, None]


VECTORS: dict[type, tuple[str, Callable[[Tensor], Tensor]]] = {
    distributions.Categorical: ("logits", _softmax_information),
    distributions.OneHotCategorical: ("logits", _softmax_information),
    # Beta is one of two categories, and calls it.
    distributions.Dirichlet: ("concentration", _dirichlet_information),
}
"""By class: the one parameter, a vector for each variable, and its Fisher information."""


def density_of(distribution: Any, result: Tensor) -> Density | None:
    """What a call of `log_prob` has evaluated; None where its Fisher information is not known here."""
    name = type(distribution).__name__
    # The class whose density it is: somebody's own may add to it without changing that.
    kind = next(base for base in type(distribution).__mro__ if "log_prob" in vars(base))
    with torch.no_grad():
        if kind in VECTORS:
            attribute, of = VECTORS[kind]
            parameter = getattr(distribution, attribute)
            return Density(name, result, -1.0, [parameter], of(parameter.detach()), vector=True)
        if kind not in TABLE:
            return None
        attributes, matrix = TABLE[kind]
        parameters = [getattr(distribution, attribute) for attribute in attributes]
        shape = distribution.batch_shape
        rows = [
            torch.stack([torch.as_tensor(entry).to(result).expand(shape) for entry in row], dim=-1)
            for row in matrix(distribution)
        ]
        information = torch.stack(rows, dim=-2)
    kept = [index for index, parameter in enumerate(parameters) if parameter.requires_grad]
    if not kept:
        return None
    return Density(
        name,
        result,
        -1.0,
        [parameters[index] for index in kept],
        information[..., kept, :][..., :, kept],
    )


def _poisson(call: LossCall) -> tuple[Tensor, Tensor]:
    """Fisher information in the input, and what is left out of −ln p(y): ln y!, or what Stirling's formula lacks."""
    f, y = call.arguments["input"].detach(), call.arguments["target"].detach()
    constant = torch.lgamma(y + 1)
    if call.arguments["full"]:
        approximate = y * y.log() - y + 0.5 * (2 * math.pi * y).log()
        constant = constant - torch.where(y > 1, approximate, torch.zeros_like(y))
    return (f.exp() if call.arguments["log_input"] else 1 / (f + call.arguments["eps"])), constant


def _laplace_of_l1(call: LossCall) -> tuple[Tensor, Tensor]:
    """|f − y| + ln 2, a Laplace density of scale 1."""
    f = call.arguments["input"].detach()
    return torch.ones_like(f), torch.full_like(f, math.log(2))


LOSSES: dict[Callable[..., Any], Callable[[LossCall], tuple[Tensor, Tensor]]] = {
    F.poisson_nll_loss: _poisson,
    F.l1_loss: _laplace_of_l1,
}


def density_of_call(call: LossCall) -> Density | None:
    """The density that a call of one of PyTorch's losses stands for, None if it is not one of `LOSSES`."""
    of = LOSSES.get(call.function)
    f, y = call.arguments.get("input"), call.arguments.get("target")
    if of is None or not isinstance(f, Tensor) or not isinstance(y, Tensor):
        return None
    if f.shape != y.shape or y.requires_grad or call.arguments.get("weight") is not None:
        return None
    with torch.no_grad():
        information, constant = of(call)
    share = 1 / f.numel() if call.arguments["reduction"] == "mean" else 1.0
    information = information.reshape(*information.shape, 1, 1)
    return Density(call.name, call.result, 1.0, [f], information, constant=constant, share=share)


@contextmanager
def noted_log_probs() -> Iterator[list[tuple[Any, Tensor]]]:
    """Note every call of a `log_prob` of torch.distributions, with what it returned, in the order in which they end.

    The methods are exchanged on the classes for as long as this lasts: calls from other threads are noted as well,
    and have no part in the graph of the loss.
    """
    calls: list[tuple[Any, Tensor]] = []
    classes = [
        kind
        for kind in vars(distributions).values()
        if isinstance(kind, type)
        and issubclass(kind, distributions.Distribution)
        and "log_prob" in vars(kind)
    ]
    originals = {kind: kind.log_prob for kind in dict.fromkeys(classes)}

    def noting(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(original)
        def log_prob(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            result = original(self, *args, **kwargs)
            # The information is that in the parameters: a value that depends on them too has more to it.
            (value,) = (*args, *kwargs.values())
            if isinstance(result, Tensor) and result.grad_fn is not None and not value.requires_grad:
                calls.append((self, result))
            return result

        return log_prob

    try:
        for kind, original in originals.items():
            setattr(kind, "log_prob", noting(original))  # noqa: B010 - mypy knows a method here
        yield calls
    finally:
        for kind, original in originals.items():
            setattr(kind, "log_prob", original)  # noqa: B010

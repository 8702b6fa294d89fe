"""Squares and cross-entropies that were written out by hand, told by the first two derivatives of the loss.

A loss is taken for one only if its value is that of the likelihood, too: then it is a weighted sum of its terms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bayes.capture.any_loss.second_derivative import Derivatives, Outputs
from lightning_bayes.capture.any_loss.step_run import Read, reduced, remark_weights
from lightning_bayes.capture.loss_calls import RELATIVE_TOLERANCE, Reduction, overridden
from lightning_bayes.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from lightning_bayes.likelihoods.bernoulli import BinaryTargets
from lightning_bayes.likelihoods.categorical import ClassTargets
from lightning_bayes.likelihoods.gaussian import WeightedTargets

ROUNDING = 1e3
"""Allowed difference, in units of the type's rounding, of what are sums of the same terms."""


@dataclass(frozen=True)
class _Loss:
    """A loss in outputs of which one tensor, or several, are all there is.

    Attributes:
        value: Of the loss.
        image: H r for random r.
    """

    outputs: Outputs
    value: float
    gradient: list[Tensor]
    vector: list[Tensor]
    image: list[Tensor]

    @property
    def eps(self) -> float:
        return max(torch.finfo(tensor.dtype).eps for tensor in self.gradient)

    def is_value(self, total: Tensor, counted: Tensor | None = None) -> bool:
        """Whether a likelihood's own sum is the value, but for its rounding.

        Args:
            total: The sum.
            counted: The weights of its logarithms, which are rounded at the size of the outputs, however small.
        """
        relative = max(RELATIVE_TOLERANCE[tensor.dtype] for tensor in self.gradient)
        each = 0.0
        if counted is not None:
            each = (
                10
                * self.eps
                * (1 + max(tensor.detach().abs().max().item() for tensor in self.outputs.tensors))
            )
        absolute = 0.0 if counted is None else each * counted.double().sum().item()
        return math.isclose(total.item(), self.value, rel_tol=relative, abs_tol=absolute)

    def common(self, weights: Tensor, curvature: Tensor) -> Tensor | None:
        """Weights of the terms as far as they tell, None if they do not.

        Where the curvature of a term is no more than rounding its weight is that of all, if they have one.
        """
        counts = torch.zeros_like(weights, dtype=torch.bool)
        told = curvature > self.eps**0.5
        counts[told] = weights[told] > self.eps**0.5 * weights[told].max() if bool(told.any()) else False
        if not bool(counts.any()) or bool((weights[told] < 0).any()):
            return None
        one = weights.flatten()[torch.where(counts, curvature, 0.0).argmax()]
        if bool(((weights[counts] - one).abs() <= 10 * self.eps**0.5 * one).all()):
            return torch.where(told & ~counts, torch.zeros_like(weights), one)
        return weights if bool(told.all()) else None


def recognised(
    outputs: Outputs,
    derivatives: Derivatives,
    value: float,
    reduction: Reduction,
    term: Callable[[Tensor], float],
    given: Likelihood | None,
) -> Read | None:
    """The likelihood that a loss is the weighted sum of, with outputs and targets; None if it is none of those known.

    Args:
        outputs: Where the network ends.
        derivatives: Of the loss in these.
        value: Of the loss.
        reduction: Of the loss.
        term: What a term of weight 1 counts in it, by what each of them does.
        given: In the place of the likelihood that is recognised.
    """
    vector = derivatives.random()
    loss = _Loss(outputs, value, derivatives.gradient, vector, derivatives.products(vector))
    one = loss.gradient[0] if len(loss.gradient) == 1 else None
    likelihood: Likelihood
    if derivatives.is_quadratic():
        weights = _squares(loss, derivatives)
        if weights is None:
            return None
        normaliser = term(weights)
        likelihood, num_terms = reduced(Gaussian(), reduction, normaliser)
        likelihood = likelihood if given is None else overridden("a squared error by hand", likelihood, given)
        remark_weights(likelihood, weights)
        rows = outputs.rows(outputs.tensors)
        safe = weights.masked_fill(weights == 0, 1.0)
        values = rows.detach() - 0.5 * outputs.rows(loss.gradient) / safe
        return rows, WeightedTargets(values, weights / normaliser, num_terms), likelihood
    binary = None if one is None else _binary(loss)
    if binary is not None:
        positive, negative = binary
        normaliser = term(positive + negative)
        likelihood, num_terms = reduced(Bernoulli(), reduction, normaliser)
        likelihood = likelihood if given is None else overridden("a binary loss by hand", likelihood, given)
        remark_weights(likelihood, positive + negative)
        positive, negative = (outputs.rows([each / normaliser]) for each in binary)
        return outputs.rows(outputs.tensors), BinaryTargets(positive, negative, num_terms), likelihood
    return None if one is None else _cross_entropy(loss, reduction, term, given)


def _cross_entropy(
    loss: _Loss, reduction: Reduction, term: Callable[[Tensor], float], given: Likelihood | None
) -> Read | None:
    """As `recognised`, of classes in the last dimension of one tensor, or in dimension 1."""
    outputs = loss.outputs
    (tensor,), (layout,), number = outputs.tensors, outputs.layouts, outputs.num_examples
    for dim in dict.fromkeys((tensor.dim() - 1, min(1, tensor.dim() - 1))):
        classes = _classes(loss, dim) if dim and dim != layout.axis else None
        if classes is None:
            continue
        normaliser = term(classes.sum(-1))
        likelihood, num_terms = reduced(Categorical(class_dim=-1), reduction, normaliser)
        likelihood = likelihood if given is None else overridden("a cross-entropy by hand", likelihood, given)
        remark_weights(likelihood, classes.sum(-1))
        if layout.axis > dim:
            return None
        last = tensor.movedim(dim, -1), classes / normaliser
        logits, targets = (layout.apart(each, number).flatten(1, -2) for each in last)
        if tensor.dim() == 2 and logits.shape[1] == 1:
            logits, targets = logits.squeeze(1), targets.squeeze(1)
        return logits, ClassTargets(targets.sum(-1), targets, num_terms), likelihood
    return None


def _squares(loss: _Loss, derivatives: Derivatives) -> Tensor | None:
    """Weights w [N, K] where the loss is Σ w (f − y)², None if it is not."""
    rows = loss.outputs.rows
    curvature = rows(loss.image) / rows(loss.vector)
    again = rows(derivatives.products([torch.ones_like(part) for part in loss.vector]))
    allowed = ROUNDING * loss.eps * curvature.abs().max()
    gradient = rows(loss.gradient)
    flat = curvature.abs() <= allowed
    if bool(
        ((curvature - again).abs() > allowed).any() | (curvature < -allowed).any() | gradient[flat].any()
    ):
        return None
    # Each column by the vector of ones, which rounds less.
    weights = 0.5 * again.masked_fill(flat, 0.0)
    residual = torch.where(flat, torch.zeros_like(gradient), gradient / again.masked_fill(flat, 1.0))
    return weights if loss.is_value(0.5 * (gradient * residual).double().sum()) else None


def _binary(loss: _Loss) -> tuple[Tensor, Tensor] | None:
    """Weights of −ln σ(f) and −ln σ(−f), None if the loss is not made of these."""
    f, gradient, image = loss.outputs.tensors[0].detach(), loss.gradient[0], loss.image[0]
    p = f.sigmoid()
    curvature = p * (-f).sigmoid()
    weights = loss.common(
        image / (loss.vector[0] * curvature.clamp(min=torch.finfo(f.dtype).tiny)), curvature
    )
    if weights is None:
        return None
    # Nothing at all comes of what is ignored, and of what the network is as sure of as the type can say.
    ignored = (image == 0) & (gradient == 0) & (curvature > 100 * loss.eps)
    weights = weights.masked_fill(ignored, 0.0)
    positive = weights * p - gradient
    negative = weights - positive
    allowed = ROUNDING * loss.eps * weights.max()
    if bool((positive < -allowed).any() | (negative < -allowed).any()):
        return None
    raw = positive.clamp(min=0.0), negative.clamp(min=0.0)
    # Labels of 0 and 1, whose digits a network that is sure of them has lost.
    is_one, is_zero = negative <= allowed, positive <= allowed
    labelled = torch.where(is_zero, 0.0, weights * is_one), torch.where(is_one, 0.0, weights * is_zero)
    choices = [labelled, raw] if bool((is_one | is_zero).all()) else [raw]
    for positive, negative in choices:
        total = -(positive * F.logsigmoid(f) + negative * F.logsigmoid(-f)).double().sum()
        if loss.is_value(total, positive + negative):
            return positive, negative
    return None


def _classes(loss: _Loss, dim: int) -> Tensor | None:
    """Weights q [..., C] where the loss is −Σ q_c ln softmax(f)_c over classes in one dimension, None if it is not.

    From all classes but the likeliest, whose numbers keep their digits in a network that is sure of it.
    """
    parts = (loss.outputs.tensors, loss.gradient, loss.image, loss.vector)
    f, gradient, image, vector = (part[0].detach().movedim(dim, -1) for part in parts)
    if f.shape[-1] < 2:
        return None
    p = f.softmax(-1)
    likeliest = p.argmax(-1, keepdim=True)
    vector = vector - vector.gather(-1, likeliest)
    expected = p * (vector - (p * vector).sum(-1, keepdim=True))
    expected, rest, without = (each.scatter(-1, likeliest, 0.0) for each in (expected, image, gradient))
    size = expected.abs().sum(-1, keepdim=True)
    weights = (rest * expected.sign()).sum(-1, keepdim=True) / size.clamp(min=torch.finfo(f.dtype).tiny)
    if bool(
        (weights < 0).any()
        | ((rest - weights * expected).abs().sum() > ROUNDING * loss.eps * rest.abs().sum())
    ):
        return None
    q = (weights * p).scatter(-1, likeliest, 0.0) - without
    allowed = ROUNDING * loss.eps * weights.max()
    if bool((q < -allowed).any()):
        return None
    q = torch.where(q.abs() <= 10 * loss.eps * weights * p, torch.zeros_like(q), q.clamp(min=0.0))
    q = q.scatter(-1, likeliest, (weights - q.sum(-1, keepdim=True)).clamp(min=0.0))
    return q if loss.is_value(-(q * F.log_softmax(f, dim=-1)).double().sum(), q) else None

"""Independent binary outputs, one or many labels an example."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_bayes.likelihoods.base import WEIGHTED, DiagonalLikelihood, flatten_alike, weights_of
from lightning_bayes.numerics.devices import accumulation_dtype


@dataclass(frozen=True)
class BinaryTargets:
    """Weights of −ln σ(f) and of −ln σ(−f) in the loss, [N, K] each."""

    positive: Tensor
    negative: Tensor
    num_terms: float | None = None
    """What the loss divides their sum by, None for N K."""


class Bernoulli(DiagonalLikelihood):
    """Independent binary outputs, from logits [N, ...]; targets in [0, 1] of the same shape.

    The loss of one output is −w (p y ln σ(f) + (1 − y) ln σ(−f)), `F.binary_cross_entropy_with_logits`.

    Args:
        weight: w ≥ 0 of each output, of a shape that broadcasts against the outputs.
        pos_weight: p ≥ 0 of the positive targets of each output, of such a shape.

    Raises:
        ValueError: If a weight is negative or not finite.
    """

    name = "binary"

    def __init__(self, weight: Tensor | None = None, pos_weight: Tensor | None = None) -> None:
        self.weight = None if weight is None else weights_of("weight", weight)
        self.pos_weight = None if pos_weight is None else weights_of("pos_weight", pos_weight)
        self.note = None if weight is None and pos_weight is None else WEIGHTED

    @override
    def prepare(self, outputs: Tensor, targets: Tensor | BinaryTargets) -> tuple[Tensor, BinaryTargets]:
        """Outputs become [N, K]."""
        if isinstance(targets, BinaryTargets):
            return outputs, targets
        flat, y = flatten_alike(outputs, targets, self.name)
        low, high = y.min().item(), y.max().item()
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"Binary targets must lie in [0, 1], got {low:g} .. {high:g}. Class indices belong to "
                'likelihood="classification", real values to likelihood="regression".'
            )
        positive, negative = y, 1 - y
        if self.pos_weight is not None:
            positive = positive * _broadcast("pos_weight", self.pos_weight, outputs)
        if self.weight is not None:
            weight = _broadcast("weight", self.weight, outputs)
            positive, negative = positive * weight, negative * weight
        return flat, BinaryTargets(positive, negative)

    @override
    def weighted(self, targets: BinaryTargets, weights: Tensor, num_terms: float) -> BinaryTargets:
        weights = weights.reshape(targets.positive.shape).to(targets.positive)
        return BinaryTargets(targets.positive * weights, targets.negative * weights, num_terms)

    @override
    def num_terms(self, outputs: Tensor, targets: BinaryTargets) -> float:
        """N K, whatever the weights: PyTorch's mean does not divide by them."""
        return outputs.numel() if targets.num_terms is None else targets.num_terms

    @override
    def unit_loss(self, outputs: Tensor, targets: BinaryTargets) -> Tensor:
        """−Σ w (p y ln σ(f) + (1 − y) ln σ(−f)) over examples and outputs."""
        losses = targets.positive * F.logsigmoid(outputs) + targets.negative * F.logsigmoid(-outputs)
        return -losses.sum(dtype=accumulation_dtype(losses.device))

    @override
    def sqrt_diagonal(self, outputs: Tensor, targets: BinaryTargets) -> Tensor:
        """√(w (p y + 1 − y) σ(f) σ(−f))."""
        outputs = outputs.detach()
        root = (0.5 * (F.logsigmoid(outputs) + F.logsigmoid(-outputs))).exp()
        return root * (targets.positive + targets.negative).sqrt()

    @override
    def null_loss(self, outputs: Tensor, targets: BinaryTargets) -> float:
        """Summed weights times ln 2; N K ln 2 without any."""
        return math.log(2) * (targets.positive + targets.negative).double().sum().item()


def _broadcast(name: str, weights: Tensor, outputs: Tensor) -> Tensor:
    """Weights as PyTorch broadcasts them against the outputs, then flattened as those are."""
    try:
        spread = weights.to(outputs).broadcast_to(outputs.shape)
    except RuntimeError as error:
        raise ValueError(
            f"Expected argument `{name}` to broadcast against the outputs {list(outputs.shape)}, got "
            f"{list(weights.shape)}. Weights of single examples are data: read them from a training_step."
        ) from error
    return spread.reshape(len(outputs), -1)

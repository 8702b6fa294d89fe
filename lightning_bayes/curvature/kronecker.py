"""The block-diagonal Kronecker approximation of the generalized Gauss-Newton matrix (KFLR).

Martens & Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature*, ICML 2015;
Botev, Ritter & Barber, *Practical Gauss-Newton Optimisation for Deep Learning*, ICML 2017, for the exact
output factor that KFLR takes. Scales as BackPACK and laplace-torch have them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_bayes.curvature.base import Curvature, CurvatureSummary, Problem, accumulation_dtype
from lightning_bayes.curvature.rows import DenseRows, OuterRows, RowBlock
from lightning_bayes.functional.evidence import effective_parameters, log_det_from_eigenvalues

__all__ = ["KroneckerCurvature"]

MAX_EXACT_BLOCK = 1024
"""Parameters up to this size that have no Kronecker form keep their exact block, larger ones its diagonal."""


class _Block(ABC):
    """The part of the matrix that belongs to one parameter tensor, as sums over the batches."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, *factors: Tensor) -> None:
        """Add the factors of one batch."""
        if not self._sums:
            # A copy even in float64: a linear layer gives one output factor to its weight and to its bias.
            self._sums = [factor.to(accumulation_dtype(factor.device), copy=True) for factor in factors]
        else:
            for total, factor in zip(self._sums, factors, strict=True):
                total.add_(factor)

    @abstractmethod
    def spectrum(self, gradient: Tensor, num_examples: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues, and the gradient in the eigenvectors' coordinates."""


class _KroneckerBlock(_Block):
    """B ⊗ A with A = (1/N) Σ a aᵀ [in, in] and B = Σ g gᵀ [out, out]."""

    def spectrum(self, gradient: Tensor, num_examples: int) -> tuple[Tensor, Tensor]:
        inputs, grads = self._sums
        values_a, vectors_a = torch.linalg.eigh(inputs / num_examples)
        values_b, vectors_b = torch.linalg.eigh(grads)
        rotated = vectors_b.mT @ gradient.reshape(len(values_b), len(values_a)).to(grads) @ vectors_a
        # Rounding leaves eigenvalues of -1e-17 where the matrix has none.
        return values_b.clamp(min=0).unsqueeze(1) * values_a.clamp(min=0), rotated


class _ExactBlock(_Block):
    """Σ v vᵀ [p, p], nothing approximated within the tensor."""

    def spectrum(self, gradient: Tensor, num_examples: int) -> tuple[Tensor, Tensor]:
        (total,) = self._sums
        values, vectors = torch.linalg.eigh(total)
        return values.clamp(min=0), vectors.mT @ gradient.flatten().to(total)


class _DiagonalBlock(_Block):
    """Σ v² [p]."""

    def spectrum(self, gradient: Tensor, num_examples: int) -> tuple[Tensor, Tensor]:
        (total,) = self._sums
        return total, gradient.flatten().to(total)


class KroneckerCurvature(Curvature):
    """One block for each parameter tensor: weights of linear and convolutional layers as B ⊗ A.

    Biases and other parameters up to `MAX_EXACT_BLOCK` entries keep their exact block, larger ones of
    other layers its diagonal. Convolutions count each output position as an input of the linear map in A
    and sum the positions in B, as BackPACK does.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._blocks: dict[str, _Block] = {}
        self._num_examples = 0

    def update(self, block: RowBlock) -> None:
        """See `Curvature.update`."""
        first = block.columns.start == 0
        self._num_examples += block.num_examples if first else 0
        for layer in block.layers:
            if isinstance(layer, OuterRows):
                self._update_outer(layer, first)
            else:
                self._update_dense(layer)

    def _update_outer(self, layer: OuterRows, first: bool) -> None:
        grads = layer.grads().sum(2).flatten(0, 1)
        output_factor = grads.mT @ grads
        if layer.weight is not None:
            inputs = layer.inputs().flatten(0, 1)
            # The inputs are those of all columns: they count with the first.
            input_factor = inputs.mT @ inputs if first else inputs.new_zeros(inputs.shape[1], inputs.shape[1])
            self._add(layer.weight, _KroneckerBlock, input_factor, output_factor)
        if layer.bias is not None:
            self._add(layer.bias, _ExactBlock, output_factor)

    def _update_dense(self, layer: DenseRows) -> None:
        if layer.shape.numel() <= MAX_EXACT_BLOCK:
            rows = layer.dense()[layer.name].flatten(0, 1)
            self._add(layer.name, _ExactBlock, rows.mT @ rows)
        else:
            self._add(layer.name, _DiagonalBlock, layer.sum_squares()[layer.name].flatten())

    def _add(self, name: str, block: type[_Block], *factors: Tensor) -> None:
        self._blocks.setdefault(name, block()).add(*factors)

    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """See `Curvature.at`."""
        log_det = gamma = quadratic = 0.0
        for name, full_gradient in gradient.items():
            if name not in self._blocks:  # not on the way to the outputs: no curvature
                quadratic += full_gradient.square().sum().item() / precision[name]
                continue
            values, rotated = self._blocks[name].spectrum(full_gradient, self._num_examples)
            log_det += log_det_from_eigenvalues(values, precision[name]).item()
            gamma += effective_parameters(values, precision[name]).item()
            quadratic += (rotated.square() / (values + precision[name])).sum().item()
        return CurvatureSummary(log_det, (0.0, math.inf), gamma, quadratic)

    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        """See `Curvature.spectrum`."""
        return torch.cat([values.flatten() / precision[name] for name, values in self._values().items()])

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """See `Curvature.log_det_and_traces`."""
        log_det = log_det_from_eigenvalues(self.spectrum(precision), 1.0).item()
        gammas = dict.fromkeys(self.problem.shapes, 0.0)
        return log_det, gammas | {
            name: effective_parameters(values, precision[name]).item()
            for name, values in self._values().items()
        }

    def _values(self) -> dict[str, Tensor]:
        like = next(iter(self._blocks.values()))._sums[0]
        shapes = self.problem.shapes
        return {
            name: block.spectrum(like.new_zeros(shapes[name]), self._num_examples)[0]
            for name, block in self._blocks.items()
        }

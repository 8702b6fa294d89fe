"""The rows of a dual in the eigenbasis of each example, and which of them a bracket needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lightning_bayes.curvature.gram import KeptRows
from lightning_bayes.curvature.kept import cross_all

__all__ = ["PrincipalRows", "principal_rows"]

BLOCK = 128
"""Rows by which the diagonal of K is deflated at a time."""
DEFLATION_SHARE = 0.06
"""Operations of one such block, relative to those that are left to do, up to which it is tried."""


@dataclass(frozen=True)
class PrincipalRows:
    """Rows Σ_c U[n, c, i] v₍ₙ,c₎ with U the eigenvectors of the examples' own blocks of K.

    Rows are numbered i·N + n. `residual` is the diagonal of the Schur complement of I + K_LL in I + K, less 1,
    for the rows L that are marked: with any S that contains L,

        ln det(I + K) ≤ ln det(I + K_SS) + Σ_{i∉S} ln(1 + residual_i).
    """

    layers: Sequence[KeptRows]  # [C, N, ...]
    eigenvalues: Tensor  # [C·N] float64: K_ii
    residual: Tensor  # [C·N] float64
    marked: Tensor  # [C·N] bool: L

    def smallest_set(self, width: float) -> Tensor:
        """Numbers of S, as small as it may be for this bound to be `width` above ln det(I + K_SS), by example."""
        ascending, order = self.residual.masked_fill(self.marked, torch.inf).sort()
        dropped = int((ascending.log1p().cumsum(0) <= width).sum())
        chosen = order[dropped:]
        return chosen[(chosen % self.layers[0].rows.shape[1]).argsort()]

    def pick(self, rows: Tensor) -> list[KeptRows]:
        """Some rows, by their numbers, as [1, R]."""
        examples = self.layers[0].rows.shape[1]
        return [layer.select(rows // examples, rows % examples) for layer in self.layers]

    def deflated(
        self, width: float, precision: Mapping[str, float], operations: Callable[[int], float]
    ) -> Self:
        """Mark blocks of large rows for as long as what they save in S is more than what they cost.

        Args:
            width: See `smallest_set`.
            precision: λ of each parameter tensor.
            operations: Of the log-determinant of so many rows.
        """
        like, rows = self.layers[0].rows, len(self.marked)
        whitened, residual, marked = like.new_zeros(0, rows), self.residual, self.marked.clone()
        now = self
        left = operations(len(self.smallest_set(width)))
        while True:
            cost = 2.0 * rows * BLOCK * (operations(2) / 4 + len(whitened))
            if cost > DEFLATION_SHARE * left:
                return now
            block = residual.masked_fill(marked, -1.0).topk(BLOCK).indices.sort().values
            cross = cross_all(self.pick(block), self.layers, precision) - whitened[:, block].mT @ whitened
            own = cross[:, block]
            own.diagonal().add_(1.0)
            factor, info = torch.linalg.cholesky_ex(own)
            if info.item() != 0:
                return now
            fresh = torch.linalg.solve_triangular(factor, cross, upper=False)
            whitened = torch.cat([whitened, fresh])
            residual = (residual - fresh.square().sum(0)).clamp_(min=0.0)
            marked[block] = True
            now = replace(self, residual=residual, marked=marked.clone())
            before, left = left, operations(len(now.smallest_set(width)))
            if before - left < cost:
                return now


def principal_rows(layers: Sequence[KeptRows], grams: Tensor) -> PrincipalRows:
    """Turn each example's rows so that they are orthogonal, nothing marked.

    Args:
        layers: V, [C, N, ...].
        grams: K between the rows of each example, [N, C, C] float64.
    """
    eigenvalues, rotations = torch.linalg.eigh(grams)
    diagonal = eigenvalues.clamp_(min=0.0).mT.flatten()
    turned = [layer.rotate(rotations) for layer in layers]
    return PrincipalRows(turned, diagonal, diagonal, torch.zeros_like(diagonal, dtype=torch.bool))

"""The rows of a dual in the eigenbasis of each example, and which of them a bracket needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lightning_bayes.curvature.gram import KeptRows
from lightning_bayes.curvature.kept import cross_all

__all__ = ["PrincipalRows", "principal_rows", "selected"]

BLOCK = 128
"""Rows by which the diagonal of K is deflated at a time."""
MAX_MARKED = 1024
"""Rows that are marked at most."""
NEGLIGIBLE = 0.1
"""Share of the bracket's width that the smallest rows, whose diagonal is left as it is, take together."""
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
        chosen = order[min(dropped, len(order) - 1) :]  # one row at least
        return chosen[(chosen % self.layers[0].rows.shape[1]).argsort()]

    def pick(self, rows: Tensor) -> list[KeptRows]:
        """Some rows, by their numbers, as [1, R]."""
        return selected(self.layers, rows)

    def deflated(
        self, width: float, precision: Mapping[str, float], operations: Callable[[int], float]
    ) -> Self:
        """Mark blocks of the largest rows for as long as what they save in S is more than what they cost.

        Args:
            width: See `smallest_set`.
            precision: λ of each parameter tensor.
            operations: Of the log-determinant of so many rows.
        """
        columns, candidates = self._columns_to_deflate(width)
        layers, residual = self.pick(columns), self.residual[columns]
        whitened = self.layers[0].rows.new_zeros(0, len(columns))
        now, left = self, operations(len(self.smallest_set(width)))
        for start in range(0, candidates, BLOCK):
            cost = 2.0 * len(columns) * BLOCK * (operations(2) / 4 + len(whitened))
            if cost > DEFLATION_SHARE * left:
                return now
            block = slice(start, min(start + BLOCK, candidates))
            cross = cross_all(self.pick(columns[block]), layers, precision) - whitened[:, block].mT @ whitened
            own = cross[:, block].clone()
            own.diagonal().add_(1.0)
            factor, info = torch.linalg.cholesky_ex(own)
            if info.item() != 0:
                return now
            # Some thousand columns: a product with the small inverse takes half the time of a solve.
            identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            fresh = torch.linalg.solve_triangular(factor, identity, upper=False) @ cross
            whitened = torch.cat([whitened, fresh])
            residual = (residual - fresh.square().sum(0)).clamp_(min=0.0)
            now = replace(
                self,
                residual=self.residual.index_copy(0, columns, residual),
                marked=self.marked.index_fill(0, columns[: block.stop], True),
            )
            before, left = left, operations(len(now.smallest_set(width)))
            if before - left < cost:
                return now
        return now

    def _columns_to_deflate(self, width: float) -> tuple[Tensor, int]:
        """Rows to mark, largest first, then those that may leave S by it; and how many are of the first kind.

        The larger half of S stays in it anyhow, and the smallest rows matter little.
        """
        ascending, order = self.residual.sort()
        negligible = int((ascending.log1p().cumsum(0) <= NEGLIGIBLE * width).sum())
        half = len(self.smallest_set(width)) // 2
        largest = order[len(order) - min(half, MAX_MARKED) :].flip(0)
        return torch.cat([largest, order[negligible : len(order) - half]]), len(largest)


def selected(layers: Sequence[KeptRows], rows: Tensor) -> list[KeptRows]:
    """Some rows, numbered column by column, as [1, R]."""
    examples = layers[0].rows.shape[1]
    return [layer.select(rows // examples, rows % examples) for layer in layers]


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

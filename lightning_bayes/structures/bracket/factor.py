"""The Cholesky factor of I + K_SS whose first columns are known before S is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.numerics.cholesky import log_det_of
from lightning_bayes.row_storage.stored import KeptDense
from lightning_bayes.structures.bracket.selection import Selection
from lightning_bayes.structures.dual_system import Factor, factorise

HEAD = ".head"
"""A name that no parameter can have."""


@dataclass(frozen=True)
class SplitFactor(Factor):
    """L with L Lᵀ = I + K_SS: ((A, 0), (B, C)) as its first columns [A; B] and C."""

    head: Tensor  # [S, M]
    tail: Tensor  # [S − M, S − M], lower

    @property
    def log_det(self) -> float:
        """Ln det(I + K_SS)."""
        return log_det_of(self.head) + log_det_of(self.tail)

    @property
    @override
    def rows(self) -> Tensor:
        return self.head

    @override
    def whiten(self, vectors: Tensor) -> Tensor:
        vectors = vectors.to(self.tail)
        above, below = self._halves()
        first = torch.linalg.solve_triangular(above, vectors[: len(above)], upper=False)
        rest = vectors[len(above) :] - below @ first
        return torch.cat([first, torch.linalg.solve_triangular(self.tail, rest, upper=False)])

    @override
    def unwhiten(self, vectors: Tensor) -> Tensor:
        above, below = self._halves()
        rest = torch.linalg.solve_triangular(self.tail.mT, vectors[len(above) :], upper=True)
        first = vectors[: len(above)] - below.mT @ rest
        return torch.cat([torch.linalg.solve_triangular(above.mT, first, upper=True), rest])

    def solve(self, coefficients: Tensor) -> Tensor:
        """(I + K_SS)⁻¹ times coefficients [1, S], in their type."""
        return self.unwhiten(self.whiten(coefficients.mT)).mT.to(coefficients)

    def _halves(self) -> tuple[Tensor, Tensor]:
        return self.head[: self.head.shape[1]], self.head[self.head.shape[1] :]


def factor_of(
    selection: Selection, precision: Mapping[str, float], accurate: torch.dtype, small: int
) -> tuple[Selection, SplitFactor]:
    """The factor, and the selection that it belongs to: without a head where its rounding spoils the rest.

    Raises:
        EvidenceUnavailableError: If I + K_SS has no factor even in the accurate type.
    """
    head = selection.head
    tail = selection.rows.pick(selection.tail)
    if head.shape[1]:
        # What the first columns take away from the rest is one more layer, of negative precision.
        below = head[head.shape[1] :]
        taken = KeptDense(below.unsqueeze(0), HEAD, below.shape[1:])
        try:
            system = factorise([*tail, taken], {**precision, HEAD: -1.0}, (head.dtype,), small, math.inf)
        except EvidenceUnavailableError:
            return factor_of(selection.headless(), precision, accurate, small)
    else:
        system = factorise(tail, precision, (head.dtype, accurate), small, math.inf)
    return selection, SplitFactor(head.to(system.factor), system.factor)

"""The rows S of a bracket, and the first columns of the Cholesky factor of I + K_SS, which choose them.

The largest rows are in S anyhow. Their columns of the factor are computed for all rows that may be in S as well: what
they leave of the diagonal of those tells how many of them may stay away.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_bayes.numerics.cholesky import ROUNDING_TOLERANCE, keeps_the_identity
from lightning_bayes.row_storage.collector import PrincipalRows, cross_all, smallest_set
from lightning_bayes.row_storage.stored import KeptRows
from lightning_bayes.structures.base import Budget

MAX_MARKED = 512
"""Columns of the factor that are computed at most."""
NEGLIGIBLE_SHARE = 0.05
"""Share of the bracket's width that the smallest rows, which nothing is subtracted from, take together."""


def operations(rows: int, product: int) -> float:
    """Count those of the log-determinant of so many rows whose inner products take so many multiplications."""
    return float(rows) ** 2 * product + rows**3 / 3


@dataclass(frozen=True)
class Selection:
    """S, and what the other rows can add.

    With L the first M rows of S, ln det(I + K) ≤ ln det(I + K_SS) + Σ_{i∉S} ln(1 + residual_i), where `residual` is
    the diagonal of the Schur complement of I + K_LL in I + K, less 1, or K_ii, which is larger.
    """

    rows: PrincipalRows
    chosen: Tensor  # [S]: numbers of the rows, L first
    residual: Tensor  # [C·N] float64, 0 for the rows of S
    head: Tensor  # [S, M]: the first columns of the lower Cholesky factor of I + K_SS

    @property
    def tail(self) -> Tensor:
        """Numbers of the rows of S that are not in L, by example."""
        return self.chosen[self.head.shape[1] :]

    def headless(self) -> "Selection":
        """Return S without the columns of its factor."""
        return replace(self, head=self.head[:, :0])


class _Deflation:
    """Columns of the factor of I + K over the rows that may be in S, block by block.

    Args:
        rows: All rows.
        numbers: Of those that may be in S.
        precision: λ of each parameter tensor.
    """

    def __init__(self, rows: PrincipalRows, numbers: Tensor, precision: Mapping[str, float]) -> None:
        self.rows = rows
        self.numbers = numbers
        self.residual = rows.eigenvalues[numbers]
        self.marked = numbers.new_zeros(0)  # indices into `numbers`, in the order of the columns
        self._precision = precision
        self._columns: list[Tensor] = []  # [numbers, marked] each

    @cached_property
    def _layers(self) -> list[KeptRows]:
        return self.rows.pick(self.numbers)

    def mark(self, size: int) -> bool:
        """Compute the columns of the largest residuals; False, and nothing done, where rounding spoils them."""
        block = self.residual.index_fill(0, self.marked, -1.0).topk(size).indices
        cross = cross_all(self._layers, self.rows.pick(self.numbers[block]), self._precision)
        cross[block, torch.arange(size, device=block.device)] += 1.0
        for columns in self._columns:
            cross.addmm_(columns, columns[block].mT, alpha=-1.0)
        factor, info = torch.linalg.cholesky_ex(cross[block])
        if info.item() != 0 or factor.diagonal().square().min().item() <= 1.0 - ROUNDING_TOLERANCE:
            return False
        # Some thousand rows: a product with the small inverse takes half the time of a solve.
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        fresh = cross @ torch.linalg.solve_triangular(factor, identity, upper=False).mT
        fresh[block] = factor
        fresh[self.marked] = 0.0
        self._columns.append(fresh)
        self.residual = (self.residual - fresh.square().sum(1)).clamp_(min=0.0)
        self.marked = torch.cat([self.marked, block])
        return True

    def keep(self, width: float) -> Tensor:
        """Indices of S into `numbers`: those that are marked, then the others by example."""
        unmarked = torch.ones_like(self.residual, dtype=torch.bool).index_fill_(0, self.marked, False)
        free = unmarked.nonzero().squeeze(1)
        others = free[smallest_set(self.residual[free], width)]
        return torch.cat([self.marked, others[self.rows.by_example(self.numbers[others])]])

    def head(self, kept: Tensor) -> Tensor:
        """The columns, as far as they belong to some indices: [kept, marked]."""
        none = self.rows.layers[0].rows.new_zeros(len(kept), 0)
        return torch.cat([none, *(columns[kept] for columns in self._columns)], dim=1)


def select(
    rows: PrincipalRows,
    width: float,
    precision: Mapping[str, float],
    product: int,
    budget: Budget,
) -> Selection:
    """S as small as it may be, marking blocks of the largest rows for as long as that saves operations.

    Only rows of S as it then stands are marked, so that S never grows.

    Args:
        rows: All rows.
        width: Of the bracket about the log-determinant, nats.
        precision: λ of each parameter tensor.
        product: Multiplications of the inner product of two rows.
        budget: How many rows are marked.
    """
    size = budget.marked_rows
    ascending, order = rows.eigenvalues.sort()
    added = ascending.log1p().cumsum(0)
    negligible = min(int((added <= NEGLIGIBLE_SHARE * width).sum()), len(order) - 1)
    width -= added[negligible - 1].item() if negligible else 0.0
    deflation = _Deflation(rows, order[negligible:], precision)
    kept = deflation.keep(width)
    most = MAX_MARKED if keeps_the_identity(rows.eigenvalues.to(rows.layers[0].rows)) else 0
    while len(deflation.marked) + size <= min(len(kept) // budget.marked_share, most) and deflation.mark(
        size
    ):
        before, kept = len(kept), deflation.keep(width)
        # What is computed for other rows of S is needed anyhow, and half of what is computed for the block's own.
        wasted = 2.0 * (len(deflation.numbers) - len(kept)) * size + size**2
        if operations(before, product) - operations(len(kept), product) < wasted * (
            product + len(deflation.marked)
        ):
            break
    chosen = deflation.numbers[kept]
    residual = rows.eigenvalues.index_copy(0, deflation.numbers, deflation.residual).index_fill(
        0, chosen, 0.0
    )
    return Selection(rows, chosen, residual, deflation.head(kept))

"""The estimate in the space of rows: the largest exactly, random vectors for the Schur complement on the others.

Rows stand in each example's own eigenbasis. With S the largest rows and I + Q = (I + K)/(I + K_SS) the Schur
complement on the others, D its diagonal and M = D^-½ (I + Q) D^-½,

    ln det(I + K) = ln det(I + K_SS) + Σ_{i∉S} ln(1 + Q_ii) + tr ln M .

The first term is a certified lower bound, the first two an upper one, since by Hadamard tr ln M ≤ 0. S and D leave
the third a small condition number and a small variance.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

from torch import Tensor
from typing_extensions import override

from lightning_bayes.row_storage.eigenbasis_rows import EigenbasisRows
from lightning_bayes.row_storage.row_products import BatchCollector, RereadRows, StoredRows
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import Problem
from lightning_bayes.structures.lanczos.cost import num_selected, stored_bytes
from lightning_bayes.structures.lanczos.estimate import SampledLogDet
from lightning_bayes.structures.lanczos.schur_complement import SchurComplement, SelectedRows


class RowSpaceLanczos(SampledLogDet):
    """All rows, stored where they fit `Budget.stored_bytes`, or read again for each product.

    Args:
        problem: Sizes.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._rows = EigenbasisRows(self.shape, num_selected(problem))
        self._collector = BatchCollector()
        self._stored = StoredRows()
        # Without a way to read them again rows are stored whatever they take.
        self.rereads = problem.passes is not None and stored_bytes(problem) > problem.budget.stored_bytes

    @override
    def update(self, chunk: RowChunk) -> None:
        layers = self._collector.add(chunk)
        if layers is not None:
            self._rows.add(layers)
            if not self.rereads:
                self._stored.add(layers)

    @override
    def prepare(self, precisions: Sequence[Mapping[str, float]]) -> None:
        self._selection.prepare([self.scale_of(precision) for precision in precisions])

    @override
    def known_part(self, scale: float) -> SchurComplement:
        return SchurComplement(self._selection, scale)

    @cached_property
    def _selection(self) -> SelectedRows:
        passes = self.problem.passes if self.rereads else None
        return SelectedRows(self._rows, self._stored if passes is None else RereadRows(passes()))

    @override
    def like(self) -> Tensor:
        return self._rows.diagonal().to(self.problem.dtype)

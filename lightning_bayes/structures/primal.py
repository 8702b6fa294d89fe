"""G = VᵀV [p, p] itself: the exact structure where parameters are fewer than rows."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.numerics.cholesky import (
    SMALL_ROUNDING,
    bounds_of,
    cholesky_in_place,
    eigenvalues_of,
    log_det_of,
    rounding_of_log_det,
    shrinkage_of,
    spoilt,
    whitened,
    whitening,
)
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.numerics.second_moment import add_products
from lightning_bayes.row_storage.newton_decrement import quadratic_form_by_factor
from lightning_bayes.rows.rows import RowChunk, Rows
from lightning_bayes.structures.base import Curvature, CurvatureSummary, Problem


class PrimalCurvature(Curvature):
    """G [p, p] from the rows, while they are few, or by accumulation over the batches, in float64.

    From rows that are there, the model's own type is tried first and float64 is left for where it does not do.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._sizes = {name: shape.numel() for name, shape in problem.shapes.items()}
        self._accurate = accumulation_dtype(problem.device)
        self._rows = _RowBuffer(problem)
        self._quick: Tensor | None = None  # on and above the diagonal, from `_rows`
        self._matrix: Tensor | None = None  # the same in float64, from all rows that are not kept

    @property
    @override
    def searches_by_spectrum(self) -> bool:
        return self.problem.is_small

    @override
    def update(self, chunk: RowChunk) -> None:
        if not chunk.layers:
            return
        num_rows = (chunk.columns.stop - chunk.columns.start) * chunk.num_examples
        if len(self._rows) + num_rows > self.problem.budget.primal_rows * self.problem.num_parameters:
            self._in_float64()  # from now on batch by batch
        self._rows.add(chunk.layers, num_rows)
        self._quick = None
        if self._matrix is not None:
            self._in_float64()

    @override
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        factor = self._factor(precision)
        # The squared norm of L is the trace of L Lᵀ.
        rounding = rounding_of_log_det(factor.tril().square().sum().item(), factor.dtype)
        log_det, gamma = log_det_of(factor), sum(shrinkage_of(factor, self._sizes.values()))
        bounds = bounds_of(log_det, rounding)
        scale, is_accurate = whitening(precision, self._sizes, factor), factor.dtype == self._accurate
        rows = None if is_accurate else self._rows.whole()
        quadratic = quadratic_form_by_factor(factor, scale, self.problem.shapes, precision, gradient, rows)
        return CurvatureSummary(log_det, bounds, gamma, quadratic)

    @override
    def log_det_and_gamma(self, precision: Mapping[str, float]) -> tuple[float, float]:
        log_det, traces = self.log_det_and_traces(precision)
        return log_det, sum(traces.values())

    @override
    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        matrix = self._in_float64()
        return eigenvalues_of(whitened(matrix, whitening(precision, self._sizes, matrix)))

    @override
    def cheap_spectra(self, precision: Mapping[str, float]) -> Iterator[Tensor]:
        if self.problem.sampled or self.problem.num_parameters > self.problem.budget.common_spectrum:
            return
        if self._rows:  # in their own type first: to the rounding of the largest eigenvalue
            matrix = self._quick_matrix()
            yield eigenvalues_of(whitened(matrix, whitening(precision, self._sizes, matrix)))
        yield self.spectrum(precision)

    @override
    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        factor = self._factor(precision)
        traces = shrinkage_of(factor, self._sizes.values())
        return log_det_of(factor), dict(zip(self._sizes, traces, strict=True))

    def _in_float64(self) -> Tensor:
        """Add the rows that are kept to G in float64, and return it, on and above the diagonal."""
        if self._matrix is None:
            p = self.problem.num_parameters
            self._matrix = torch.zeros(p, p, dtype=self._accurate, device=self.problem.device)
        if self._rows:  # in parts: a copy of all in float64 would be twice as large as they are
            for some in self._rows.taken().split(max(1, self.problem.num_parameters)):
                add_products(self._matrix, some.to(self._matrix))
        return self._matrix

    def _quick_matrix(self) -> Tensor:
        """G from the rows that are kept, in their type, on and above the diagonal."""
        rows = self._rows.whole()
        if self._quick is None:
            self._quick = rows.new_zeros(rows.shape[1], rows.shape[1])
            add_products(self._quick, rows)
        return self._quick

    def _factor(self, precision: Mapping[str, float]) -> Tensor:
        """Return the Cholesky factor of I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ², in the first type that can be believed."""
        factor = None
        if self._rows:
            matrix = self._quick_matrix()
            scale = whitening(precision, self._sizes, matrix)
            factor = cholesky_in_place(whitened(matrix, scale), SMALL_ROUNDING)
        if factor is None:
            matrix = self._in_float64()
            factor = cholesky_in_place(whitened(matrix, whitening(precision, self._sizes, matrix)))
        if factor is None:
            raise spoilt()
        return factor


class _RowBuffer:
    """Rows [m, p] one below the other, in memory for as many as are expected.

    Put together from batches they would be copied twice, which takes as long as forming them.
    """

    def __init__(self, problem: Problem) -> None:
        self._shapes, self._dtype, self._device = problem.shapes, problem.dtype, problem.device
        self._expected = min(problem.num_rows, problem.budget.primal_rows * problem.num_parameters)
        self._memory: Tensor | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, layers: Sequence[Rows], num_rows: int) -> None:
        """Add the rows of one chunk; parameters that are left out have rows of zeros."""
        end = self._count + num_rows
        place = self._room(end)[self._count : end]
        parts = place.split([shape.numel() for shape in self._shapes.values()], dim=1)
        places = dict(zip(self._shapes, parts, strict=True))
        for layer in layers:
            for name, rows in layer.dense().items():
                places.pop(name).unflatten(0, rows.shape[:2]).copy_(rows)
        for left_out in places.values():
            left_out.zero_()
        self._count = end

    def whole(self) -> Tensor:
        """All rows."""
        if self._memory is None:
            raise ValueError("No rows have been added.")
        return self._memory[: self._count]

    def taken(self) -> Tensor:
        """All rows, which are then no longer here."""
        rows = self.whole()
        self._memory, self._count, self._expected = None, 0, 0
        return rows

    def _room(self, size: int) -> Tensor:
        """Memory for so many rows at least, with those that are there."""
        if self._memory is None or len(self._memory) < size:
            size = max(size, 2 * self._count, self._expected)
            width = sum(shape.numel() for shape in self._shapes.values())
            memory = torch.empty(size, width, dtype=self._dtype, device=self._device)
            if self._memory is not None:
                memory[: self._count] = self.whole()
            self._memory = memory
        return self._memory

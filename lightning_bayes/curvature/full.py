"""The whole generalized Gauss-Newton matrix, nothing dropped, through whichever side is smaller.

Primal: G = VᵀV [p, p] when parameters are fewer than rows. Dual: K = V Λ⁻¹ Vᵀ [rows, rows] otherwise, by
ln det(I + Λ⁻¹ᐟ² VᵀV Λ⁻¹ᐟ²) = ln det(I + V Λ⁻¹ Vᵀ) (Sylvester). For a linear layer K is (g gᵀ) ∘ (a aᵀ),
so that its p-long rows are never formed.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bayes.curvature.base import Curvature, CurvatureSummary, Problem, accumulation_dtype
from lightning_bayes.curvature.errors import EvidenceUnavailableError
from lightning_bayes.curvature.gram import KeptRows, combine_all, dot_all, fill_gram, keep, tiles_of
from lightning_bayes.curvature.rows import RowBlock

__all__ = ["DualCurvature", "PrimalCurvature", "full_cost", "full_curvature"]

FLOAT64_LIMIT = 4096
"""Up to this size the dual matrix is float64 whatever the model's type is, and the trace exact."""
NUM_PROBES = 256
"""Random vectors of the trace estimate beyond `FLOAT64_LIMIT`."""
TILE_ROWS = 1024
"""Rows of one tile of the dual matrix: large enough for the matrix product, small beside the matrix."""
ROUNDING_TOLERANCE = 1e-2
"""Rounding of the largest entry of I + K, relative to the 1, beyond which its factor is not believed."""
MAX_REFINEMENTS = 30
"""Steps of conjugate gradients for the Newton decrement; an exact factor needs two, float32 a few."""
REFINEMENT_TOLERANCE = 1e-7
"""Relative rise of the Newton decrement at which the steps end."""


def full_curvature(problem: Problem) -> Curvature:
    """Return the exact structure that takes fewer operations."""
    primal = _primal_cost(problem)[1] <= _dual_cost(problem)[1]
    return PrimalCurvature(problem) if primal else DualCurvature(problem)


def full_cost(problem: Problem) -> tuple[float, float]:
    """Bytes and floating-point operations of what `full_curvature` returns."""
    return min(_primal_cost(problem), _dual_cost(problem), key=lambda cost: cost[1])


def _primal_cost(problem: Problem) -> tuple[float, float]:
    p, rows = problem.num_parameters, problem.num_rows
    # G, scaled, its factor and inverse; the rows of one batch, apart, together and in float64.
    batch = problem.batch_size * problem.rank * p * (2 * problem.dtype.itemsize + 8)
    return 4.0 * 8 * p**2 + batch, 2.0 * rows * p**2 + p**3


def _dual_cost(problem: Problem) -> tuple[float, float]:
    rows, width, itemsize = problem.num_rows, problem.kept_width, problem.dtype.itemsize
    matrix = 2 * 8 if rows <= FLOAT64_LIMIT else itemsize  # with the inverse, or without
    # The rows as they came, put together, and in float64 for the Newton decrement.
    kept = rows * width * (2 * itemsize + 8)
    return float(rows) ** 2 * matrix + kept, float(rows) ** 2 * width + rows**3 / 3


class PrimalCurvature(Curvature):
    """G [p, p] by accumulation over the batches, in float64."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        p, dtype = problem.num_parameters, accumulation_dtype(problem.device)
        self._matrix = torch.zeros(p, p, dtype=dtype, device=problem.device)

    def update(self, block: RowBlock) -> None:
        """See `Curvature.update`."""
        found: dict[str, Tensor] = {}
        for layer in block.layers:
            found |= layer.dense()
        if not found:
            return
        like = next(iter(found.values()))
        rows = [
            found[name] if name in found else like.new_zeros(*like.shape[:2], shape.numel())
            for name, shape in self.problem.shapes.items()
        ]
        stacked = torch.cat(rows, dim=2).flatten(0, 1).to(self._matrix)
        self._matrix.addmm_(stacked.mT, stacked)

    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """See `Curvature.at`."""
        shapes = self.problem.shapes
        scale = torch.cat(
            [
                self._matrix.new_full((shape.numel(),), precision[name] ** -0.5)
                for name, shape in shapes.items()
            ]
        )
        scaled = scale.unsqueeze(1) * self._matrix * scale
        scaled.diagonal().add_(1.0)
        factor = _cholesky(scaled)
        vector = torch.cat([gradient[name].flatten() for name in shapes]).to(scale) * scale
        whitened = torch.linalg.solve_triangular(factor, vector.unsqueeze(1), upper=False)
        trace = torch.cholesky_inverse(factor).diagonal().sum().item()
        log_det = _log_det(factor)
        return CurvatureSummary(
            log_det, (log_det, log_det), len(scale) - trace, whitened.square().sum().item()
        )

    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        """See `Curvature.spectrum`."""
        return torch.linalg.eigvalsh(self._scaled(precision)).clamp(min=0)

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """See `Curvature.log_det_and_traces`."""
        factor = _cholesky(self._scaled(precision) + torch.eye(len(self._matrix)).to(self._matrix))
        shares = 1.0 - torch.cholesky_inverse(factor).diagonal()
        sizes = [shape.numel() for shape in self.problem.shapes.values()]
        traces = [part.sum().item() for part in shares.split(sizes)]
        return _log_det(factor), dict(zip(self.problem.shapes, traces, strict=True))

    def _scaled(self, precision: Mapping[str, float]) -> Tensor:
        shapes = self.problem.shapes.items()
        scale = torch.cat([self._matrix.new_full((s.numel(),), precision[n] ** -0.5) for n, s in shapes])
        return scale.unsqueeze(1) * self._matrix * scale


class DualCurvature(Curvature):
    """K = V Λ⁻¹ Vᵀ [rows, rows] from rows that are kept in their factored form.

    Memory: one rows × rows matrix, factorised in place, beside the rows' factors.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._kept: dict[tuple[str, ...], list[KeptRows]] = {}

    def update(self, block: RowBlock) -> None:
        """See `Curvature.update`."""
        layers = [kept for layer in block.layers for kept in keep(layer)]
        if self._kept and set(self._kept) != {layer.names for layer in layers}:
            raise ValueError(
                "The network uses different layers for different batches; the exact evidence needs the same "
                'ones for all. Use structure="kron" or structure="diag".'
            )
        for layer in layers:
            self._kept.setdefault(layer.names, []).append(layer)

    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """See `Curvature.at`."""
        for names, blocks in self._kept.items():
            self._kept[names] = [blocks[0].merge(blocks)]
        layers = [blocks[0] for blocks in self._kept.values()]
        if not layers:
            raise ValueError("No parameter that carries a prior has an influence on the network's outputs.")
        accurate = accumulation_dtype(self.problem.device)
        system = _factorise(layers, precision, accurate, self.problem.dtype)
        gamma, stderr = _effective_parameters(system.factor)
        layers = [layer.to(accurate) for layer in layers]
        quadratic = _quadratic(layers, system, precision, gradient)
        log_det = _log_det(system.factor)
        return CurvatureSummary(
            log_det, (log_det, log_det), gamma, quadratic, effective_parameters_stderr=stderr
        )

    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        """See `Curvature.spectrum`."""
        return torch.linalg.eigvalsh(self._gram(precision)).clamp(min=0)

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """See `Curvature.log_det_and_traces`."""
        whole = self._gram(precision)
        identity = torch.eye(len(whole)).to(whole)
        factor = _cholesky(whole + identity)
        traces = dict.fromkeys(self.problem.shapes, 0.0)
        for name in traces:
            only = {other: v if other == name else math.inf for other, v in precision.items()}
            traces[name] = torch.cholesky_solve(self._gram(only), factor).trace().item()
        return _log_det(factor), traces

    def _gram(self, precision: Mapping[str, float]) -> Tensor:
        accurate = accumulation_dtype(self.problem.device)
        layers = [blocks[0].merge(blocks).to(accurate) for blocks in self._kept.values()]
        columns, num_examples = layers[0].rows.shape[:2]
        size = columns * num_examples
        buffer = torch.zeros(size, size, dtype=accurate, device=self.problem.device)
        fill_gram(buffer, layers, tiles_of(num_examples, columns, TILE_ROWS), precision)
        return buffer.triu() + buffer.triu(1).mT


@dataclass(frozen=True)
class _System:
    """A factor of I + K, and the order in which its rows stand."""

    factor: Tensor  # [rows, rows], lower
    tiles: list[slice]

    def solve(self, coefficients: Tensor) -> Tensor:
        """(I + K)⁻¹ times coefficients [C, N], in their type."""
        columns = len(coefficients)
        ordered = torch.cat([coefficients[:, tile].flatten() for tile in self.tiles]).to(self.factor)
        # Not `cholesky_solve`, which copies the factor: that would be a second matrix of rows × rows.
        half = torch.linalg.solve_triangular(self.factor, ordered.unsqueeze(1), upper=False)
        solved = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        solved = solved.squeeze(1).to(coefficients)
        sizes = [columns * (tile.stop - tile.start) for tile in self.tiles]
        return torch.cat([part.unflatten(0, (columns, -1)) for part in solved.split(sizes)], dim=1)


def _factorise(
    layers: Sequence[KeptRows], precision: Mapping[str, float], accurate: torch.dtype, fast: torch.dtype
) -> _System:
    """Factorise I + K in the accurate type where that is cheap, else in the fast one if it can be believed."""
    columns, num_examples = layers[0].rows.shape[:2]
    tiles = tiles_of(num_examples, columns, TILE_ROWS)
    small = columns * num_examples <= FLOAT64_LIMIT
    for dtype in (accurate,) if small else dict.fromkeys((fast, accurate)):
        cast = [layer.to(dtype) for layer in layers]
        factor = _cholesky_of_gram(cast, tiles, precision)
        if factor is not None:
            return _System(factor, tiles)
        if dtype != accurate:
            warnings.warn(
                f"The Cholesky factor of {columns * num_examples} rows lost its digits in {dtype}; it is "
                f"computed again in {accurate}, which takes about twice as long and twice the memory. A larger "
                "prior precision avoids this.",
                stacklevel=2,
            )
    raise EvidenceUnavailableError(
        f"I + K of {columns * num_examples} rows is not positive definite even in {accurate}: the rows are of "
        "extreme scale. Raise the prior precision."
    )


def _cholesky_of_gram(
    layers: Sequence[KeptRows], tiles: list[slice], precision: Mapping[str, float]
) -> Tensor | None:
    """Lower factor of I + K, or None where rounding has spoilt it."""
    rows = layers[0].rows
    size = rows.shape[0] * rows.shape[1]
    buffer = torch.empty(size, size, dtype=rows.dtype, device=rows.device)
    fill_gram(buffer, layers, tiles, precision)
    # The upper triangle row by row is the lower one column by column, which LAPACK factorises in place.
    matrix = buffer.mT
    matrix.diagonal().add_(1.0)
    if not _keeps_the_identity(matrix):
        return None
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return matrix if _is_believable(matrix, info) else None


def _keeps_the_identity(matrix: Tensor) -> bool:
    """Whether the 1 in I + K survives beside the largest K: the factor's errors are of that entry's rounding.

    Pivots alone do not tell: rounding lifts as many of them as it lowers.
    """
    rounding = torch.finfo(matrix.dtype).eps * matrix.diagonal().max().item()
    return rounding <= ROUNDING_TOLERANCE


def _is_believable(factor: Tensor, info: Tensor) -> bool:
    """Whether every pivot of I + K is at least 1, as K is positive semi-definite: less is rounding, seen."""
    smallest = factor.diagonal().square().min().item()
    return info.item() == 0 and smallest > 1.0 - ROUNDING_TOLERANCE


def _effective_parameters(factor: Tensor) -> tuple[float, float]:
    """Trace of K(I + K)⁻¹ = rows − tr (I + K)⁻¹, and its standard error.

    Exact where (I + K)⁻¹ is cheap beside the factor, else Hutchinson's estimate with random signs z:
    E zᵀ(I + K)⁻¹z = tr (I + K)⁻¹.
    """
    size = len(factor)
    if size <= FLOAT64_LIMIT:
        return size - torch.cholesky_inverse(factor).diagonal().sum().item(), 0.0
    generator = torch.Generator(device=factor.device).manual_seed(0)
    signs = torch.randint(0, 2, (size, NUM_PROBES), generator=generator, device=factor.device).to(factor)
    whitened = torch.linalg.solve_triangular(factor, signs.mul_(2).sub_(1), upper=False)
    samples = size - whitened.square().sum(0, dtype=accumulation_dtype(factor.device))
    return samples.mean().item(), (samples.std() / NUM_PROBES**0.5).item()


def _quadratic(
    layers: Sequence[KeptRows],
    system: _System,
    precision: Mapping[str, float],
    gradient: Mapping[str, Tensor],
) -> float:
    """gᵀ(G + Λ)⁻¹g as the maximum over x of 2gᵀx − xᵀ(G + Λ)x, by preconditioned conjugate gradients.

    The preconditioner is Woodbury's Λ⁻¹(I − Vᵀ(I + K)⁻¹VΛ⁻¹): with an exact factor the first step is the
    answer, and what a factor in float32 leaves is taken away by products in the layers' type. Each step
    raises the value, and the error that remains counts only by its square.
    """
    accurate = layers[0].rows.dtype
    names = list(gradient)

    def inner(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
        return sum((left[name] * right[name]).sum().item() for name in names)

    def solve(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scaled = {name: vector[name] / precision[name] for name in names}
        seen = dict(combine_all(layers, system.solve(dot_all(layers, scaled))))
        return {name: scaled[name] - seen.get(name, 0.0) / precision[name] for name in names}

    def curve(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen = dict(combine_all(layers, dot_all(layers, vector)))
        return {name: precision[name] * vector[name] + seen.get(name, 0.0) for name in names}

    residual = {name: g.to(accurate) for name, g in gradient.items()}
    direction = solve(residual)
    decrease = inner(residual, direction)
    value = 0.0
    for _ in range(MAX_REFINEMENTS):
        if decrease <= 0.0:  # nothing left, or nothing that the preconditioner can still see
            return value
        curved = curve(direction)
        step = decrease / inner(direction, curved)
        # Along the direction the value rises by decrease² over the curvature.
        value += step * decrease
        if step * decrease <= REFINEMENT_TOLERANCE * value:
            return value
        residual = {name: residual[name] - step * curved[name] for name in names}
        whitened = solve(residual)
        ahead = inner(residual, whitened)
        direction = {name: whitened[name] + ahead / decrease * direction[name] for name in names}
        decrease = ahead
    warnings.warn(
        f"The Newton decrement has not converged in {MAX_REFINEMENTS} steps and is a lower bound: the prior "
        "precision is too small for the floating-point type. A larger one, or a float64 model, avoids this.",
        stacklevel=2,
    )
    return value


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not _keeps_the_identity(matrix) or not _is_believable(factor, info):
        raise EvidenceUnavailableError(
            "The curvature plus the prior is not positive definite in floating point: the gradients are of "
            "extreme scale. Raise the prior precision."
        )
    return factor


def _log_det(factor: Tensor) -> float:
    return 2.0 * factor.diagonal().log().sum(dtype=accumulation_dtype(factor.device)).item()

"""The diagonal of the generalized Gauss-Newton matrix."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.functional.evidence import effective_parameters, log_det_from_eigenvalues
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import Curvature, CurvatureSummary, Problem
from lightning_bayes.structures.column_groups import ColumnGroups, squares_by_group


class DiagonalCurvature(Curvature):
    """d = Σ over rows of v²; every correlation between parameters is dropped.

    By Hadamard's inequality its log-determinant is never below the exact one, so its log-evidence is
    never above.
    """

    searches_by_spectrum = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._groups = ColumnGroups(problem)
        dtype = accumulation_dtype(problem.device)
        self._diagonals = [
            {
                name: torch.zeros(shape, dtype=dtype, device=problem.device)
                for name, shape in problem.shapes.items()
            }
            for _ in range(self._groups.number)
        ]

    @override
    def update(self, chunk: RowChunk) -> None:
        groups = self._groups.columns(chunk)
        for layer in chunk.layers:
            for diagonal, sums in zip(self._diagonals, squares_by_group(layer, groups), strict=True):
                for name, squares in sums.items():
                    diagonal[name] += squares

    @override
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        log_det = gamma = quadratic = log_det_stderr = gamma_stderr = 0.0
        whole = self._whole()
        for name, diagonal in whole.items():
            values = (diagonal / precision[name]).flatten()
            inverse = (1 + values).reciprocal_()
            gamma += torch.dot(values, inverse).item()
            squares = gradient[name].flatten().to(inverse, copy=True).square_()
            quadratic += torch.dot(squares, inverse).item() / precision[name]
            log_det += values.log1p_().sum().item()
        if self.problem.sampled:

            def without(group: int, scale: float) -> Iterator[Tensor]:
                for name, diagonal in whole.items():
                    yield (diagonal - self._diagonals[group][name]).clamp(min=0) * (scale / precision[name])

            (log_det, log_det_stderr), (gamma, gamma_stderr) = self._groups.jackknifed(
                log_det, gamma, without
            )
        # Hadamard: ln det(I + G/λ) ≤ Σ ln(1 + d/λ), for the whole diagonal
        upper = math.inf if self.problem.sampled else log_det
        return CurvatureSummary(
            log_det,
            (0.0, upper),
            gamma,
            quadratic,
            log_det_stderr=log_det_stderr,
            effective_parameters_stderr=gamma_stderr,
        )

    def _whole(self) -> dict[str, Tensor]:
        if len(self._diagonals) == 1:
            return self._diagonals[0]
        return {name: torch.stack([d[name] for d in self._diagonals]).sum(0) for name in self.problem.shapes}

    @override
    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        return torch.cat([d.flatten() / precision[name] for name, d in self._whole().items()])

    @override
    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        log_det = log_det_from_eigenvalues(self.spectrum(precision), 1.0).item()
        return log_det, {n: effective_parameters(d, precision[n]).item() for n, d in self._whole().items()}

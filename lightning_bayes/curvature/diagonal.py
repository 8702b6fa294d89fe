"""The diagonal of the generalized Gauss-Newton matrix."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_bayes.curvature.base import Curvature, CurvatureSummary, Problem, accumulation_dtype
from lightning_bayes.curvature.rows import RowBlock
from lightning_bayes.functional.evidence import effective_parameters, log_det_from_eigenvalues

__all__ = ["DiagonalCurvature"]


class DiagonalCurvature(Curvature):
    """d = Σ over rows of v²; every correlation between parameters is dropped.

    By Hadamard's inequality its log-determinant is never below the exact one, so its log-evidence is
    never above.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        dtype = accumulation_dtype(problem.device)
        self._diagonal = {
            name: torch.zeros(shape, dtype=dtype, device=problem.device)
            for name, shape in problem.shapes.items()
        }

    def update(self, block: RowBlock) -> None:
        """See `Curvature.update`."""
        for layer in block.layers:
            for name, squares in layer.sum_squares().items():
                self._diagonal[name] += squares

    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """See `Curvature.at`."""
        log_det = gamma = quadratic = 0.0
        for name, diagonal in self._diagonal.items():
            log_det += log_det_from_eigenvalues(diagonal, precision[name]).item()
            gamma += effective_parameters(diagonal, precision[name]).item()
            quadratic += (gradient[name].square() / (diagonal + precision[name])).sum().item()
        # Hadamard: ln det(I + G/λ) ≤ Σ ln(1 + d/λ)
        return CurvatureSummary(log_det, (0.0, log_det), gamma, quadratic)

    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        """See `Curvature.spectrum`."""
        return torch.cat([d.flatten() / precision[name] for name, d in self._diagonal.items()])

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """See `Curvature.log_det_and_traces`."""
        log_det = log_det_from_eigenvalues(self.spectrum(precision), 1.0).item()
        return log_det, {n: effective_parameters(d, precision[n]).item() for n, d in self._diagonal.items()}

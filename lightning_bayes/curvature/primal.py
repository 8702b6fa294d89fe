"""G = VᵀV [p, p] itself: the exact structure where parameters are fewer than rows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_bayes.curvature.base import CurvatureSummary, Problem, SpectralCurvature, accumulation_dtype
from lightning_bayes.curvature.cholesky import cholesky, eigenvalues_of, log_det_of
from lightning_bayes.curvature.rows import RowBlock

__all__ = ["PrimalCurvature"]


class PrimalCurvature(SpectralCurvature):
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
        factor = self._factor(precision)
        vector = torch.cat([gradient[name].flatten() for name in self.problem.shapes])
        vector = vector.to(factor) * self._scale(precision)
        whitened = torch.linalg.solve_triangular(factor, vector.unsqueeze(1), upper=False)
        log_det, traces = log_det_of(factor), self._traces(factor)
        gamma, quadratic = sum(traces.values()), whitened.square().sum().item()
        return CurvatureSummary(log_det, (log_det, log_det), gamma, quadratic)

    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        """See `Curvature.spectrum`: all p of them."""
        scale = self._scale(precision)
        return eigenvalues_of(scale.unsqueeze(1) * self._matrix * scale)

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """See `Curvature.log_det_and_traces`."""
        factor = self._factor(precision)
        return log_det_of(factor), self._traces(factor)

    def _scale(self, precision: Mapping[str, float]) -> Tensor:
        return torch.cat(
            [
                self._matrix.new_full((shape.numel(),), precision[name] ** -0.5)
                for name, shape in self.problem.shapes.items()
            ]
        )

    def _factor(self, precision: Mapping[str, float]) -> Tensor:
        scale = self._scale(precision)
        scaled = scale.unsqueeze(1) * self._matrix * scale
        scaled.diagonal().add_(1.0)
        return cholesky(scaled)

    def _traces(self, factor: Tensor) -> dict[str, float]:
        shapes = self.problem.shapes
        inverse = (
            torch.cholesky_inverse(factor).diagonal().split([shape.numel() for shape in shapes.values()])
        )
        return {name: (1.0 - part).sum().item() for name, part in zip(shapes, inverse, strict=True)}

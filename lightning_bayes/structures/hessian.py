"""The true Hessian of the summed negative log-likelihood, dense, for small models.

Unlike the generalized Gauss-Newton matrix it may have negative eigenvalues. Where H + Λ has one, the point is
no minimum of the cost, the Gaussian integral diverges, and the Laplace evidence does not exist.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.numerics.cholesky import whitened, whitening
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import Curvature, CurvatureSummary, Problem
from lightning_bayes.structures.hessian_reader import HessianChunk

EXACT = 0.01
"""Nats that rounding may put into a log-determinant that is still called exact."""

WAYS_OUT = (
    'curvature="ggn" is positive semi-definite everywhere; curvature="hessian_positive" leaves the negative '
    "eigenvalues out, which is a heuristic; more training or a larger prior precision may make a minimum of it."
)


class HessianCurvature(Curvature):
    """The dense matrix H, which need not be positive semi-definite.

    With e the eigenvalues of the whitened Λ⁻¹ᐟ² H Λ⁻¹ᐟ², those of the whitened cost's Hessian are 1 + e, and
    ln det(I + Λ⁻¹ᐟ² H Λ⁻¹ᐟ²) = Σ ln(1 + e). Rounding has put up to p · eps of the largest |e| into each, with the
    eps of the type that the Hessian was computed in: a smaller negative one counts as zero, and where that is worth
    more than `EXACT` nats the bounds hold it.

    With the curvature "hessian_positive" e < 0 are left out of every sum, as Smith & Le do who sum over the λᵢ ≥ λ.
    A heuristic: it is the evidence of another, convex cost, and no bound of anything.
    """

    searches_by_spectrum = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._sizes = {name: shape.numel() for name, shape in problem.shapes.items()}
        size, device = problem.num_parameters, problem.device
        self._matrix = torch.zeros(size, size, dtype=accumulation_dtype(device), device=device)
        self._rounding = torch.finfo(self._matrix.dtype).eps
        self._only_positive = problem.curvature == "hessian_positive"

    @override
    def update(self, chunk: RowChunk) -> None:
        if not isinstance(chunk, HessianChunk):
            raise TypeError(f"Expected the Hessian of a batch, got {type(chunk).__name__}.")
        self._matrix += chunk.matrix
        self._rounding = max(self._rounding, chunk.rounding)

    @override
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """Answer for one prior; in directions that are left out the quadratic form has the prior alone.

        Raises:
            EvidenceUnavailableError: If H + Λ is not positive definite and nothing is left out.
        """
        values, vectors = torch.linalg.eigh(self._whitened(precision))
        bounds, values = self._bounds(values), self._rounded(values)
        below, negative = int((values < 0.0).sum()), int((values <= -1.0).sum())
        if negative and not self._only_positive:
            raise EvidenceUnavailableError(
                f"The Hessian of the cost has {negative} eigenvalues at or below 0 ({below} of the likelihood's "
                f"are negative, of {len(values)}): this is no minimum, and its Laplace evidence does not exist. "
                f"{WAYS_OUT}"
            )
        values = values.clamp(min=0.0) if self._only_positive else values
        log_det = torch.log1p(values).sum().item()
        slope = torch.cat([gradient[name].flatten() for name in self._sizes]).to(vectors)
        along = vectors.mT @ (slope * whitening(precision, self._sizes, vectors))
        return CurvatureSummary(
            log_det=log_det,
            bounds=(-math.inf, math.inf) if negative else bounds,
            effective_parameters=(values / (1.0 + values)).sum().item(),
            quadratic=(along.square() / (1.0 + values)).sum().item(),
            num_below_prior=below,
            num_negative=negative,
        )

    @override
    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        """Return all eigenvalues of the whitened matrix, negative ones too unless they are left out."""
        values = self._rounded(torch.linalg.eigvalsh(self._whitened(precision)))
        return values.clamp(min=0.0) if self._only_positive else values

    @override
    def cheap_spectra(self, precision: Mapping[str, float]) -> Iterator[Tensor]:
        if self.problem.num_parameters <= self.problem.budget.common_spectrum:
            values = self.spectrum(precision)
            if not bool((values < 0.0).any()):
                yield values

    @override
    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Return the log-determinant for one prior, and γ of each parameter tensor; see `Curvature`.

        With the eigenvectors v of the whitened matrix, ∂e/∂ ln λᵢ = −e Σ_{j∈i} vⱼ², hence
        γᵢ = Σ e/(1 + e) Σ_{j∈i} vⱼ².

        Raises:
            EvidenceUnavailableError: If an eigenvalue is negative and not left out.
        """
        values, vectors = torch.linalg.eigh(self._whitened(precision))
        values = self._rounded(values)
        values = values.clamp(min=0.0) if self._only_positive else without_negative(values)
        shares = vectors.square() @ (values / (1.0 + values))
        traces = [part.sum().item() for part in shares.split(list(self._sizes.values()))]
        return torch.log1p(values).sum().item(), dict(zip(self._sizes, traces, strict=True))

    def _whitened(self, precision: Mapping[str, float]) -> Tensor:
        matrix = whitened(self._matrix, whitening(precision, self._sizes, self._matrix))
        return 0.5 * (matrix + matrix.mT)

    def _rounded(self, values: Tensor) -> Tensor:
        """Eigenvalues, with negative ones that may be rounding set to zero."""
        return torch.where((values < 0.0) & (values >= -self._tiny(values)), 0.0, values)

    def _bounds(self, values: Tensor) -> tuple[float, float]:
        """Bounds on the log-determinant for eigenvalues that are right up to rounding; equal where that is little."""
        tiny = self._tiny(values)
        # Below −1 + tiny an eigenvalue may be −1: no lower bound.
        lower, upper = ((values + shift).clamp(min=-1.0).log1p().sum().item() for shift in (-tiny, tiny))
        if upper - lower <= 2.0 * EXACT:
            whole = torch.log1p(self._rounded(values)).sum().item()
            return whole, whole
        return lower, upper

    def _tiny(self, values: Tensor) -> Tensor:
        return len(values) * self._rounding * values.abs().max()


def without_negative(values: Tensor) -> Tensor:
    """Return eigenvalues as they are, none of them negative.

    Raises:
        EvidenceUnavailableError: If one is: as the prior precision falls towards its size, the log-evidence rises to
            infinity, and has no maximum.
    """
    below = int((values < 0.0).sum())
    if below:
        raise EvidenceUnavailableError(
            f"{below} of {len(values)} eigenvalues of the Hessian are negative. As the prior precision falls "
            "towards the size of one, the log-evidence rises without bound, so no prior precision is best. "
            f"{WAYS_OUT}"
        )
    return values

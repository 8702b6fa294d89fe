"""The log-evidence as a curve over the prior precision, from one pass over the data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_bayes.evidence.laplace import Computation
from lightning_bayes.evidence.search import maximize_evidence
from lightning_bayes.evidence.totals import Totals
from lightning_bayes.functional import evidence as terms
from lightning_bayes.functional._validation import positive
from lightning_bayes.priors.prior import Prior
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import Curvature, CurvatureSummary, Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECADES = 3
"""Decades of the default grid below the optimum, and above it."""
POINTS_PER_DECADE = 10
COSTLY_DECADES = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
"""The default grid about the optimum where every λ costs as much as the first."""


@dataclass(frozen=True, eq=False)
class EvidenceCurve:
    """Log-evidence and its parts over the prior precision, at fixed weights.

    Tensors [K] in float64, in nats and summed over the examples, one entry for each prior precision.

    Attributes:
        prior_precisions: λ, ascending.
        log_evidence: log_likelihood − weight_penalty + log_occam_factor.
        log_likelihood: ln P(y | ω, x); it changes with λ only where the noise is optimized at each.
        weight_penalty: ½ λ‖ω‖².
        log_occam_factor: −½ ln det(I + G/λ).
        effective_parameters: γ = tr G(G + λ)⁻¹.
        best: The λ that maximises the log-evidence, not bound to the grid; NaN where none does, for a true Hessian
            with negative eigenvalues. At a λ that does not outweigh these the cost has no minimum, and all but the
            log-likelihood and the weight penalty is NaN.
        best_log_evidence: The log-evidence there, or NaN.
        lower: Certified lower bound at each λ, or an estimate of one where blocks are sampled; None for "kron" and
            "diag", of which none is known.
        upper: Certified upper bound at each λ, or None. Both are the log-evidence where it is exact.
        log_evidence_stderr: Standard error from random vectors at each λ; None where there are none.
        difference_stderr: That of log_evidence − best_log_evidence, which is smaller: the vectors are the same.
    """

    prior_precisions: Tensor
    log_evidence: Tensor
    log_likelihood: Tensor
    weight_penalty: Tensor
    log_occam_factor: Tensor
    effective_parameters: Tensor
    best: float
    best_log_evidence: float
    lower: Tensor | None = None
    upper: Tensor | None = None
    log_evidence_stderr: Tensor | None = None
    difference_stderr: Tensor | None = None

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the curve, what fit and prior take of it, and the best λ.

        Args:
            ax: matplotlib axes; None for new ones.

        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt  # noqa: PLC0415 - only for the figure

            ax = plt.subplots(layout="constrained")[1]
        x = self.prior_precisions.numpy()
        ax.semilogx(x, self.log_evidence.numpy(), label="log-evidence", linewidth=2)
        if self.lower is not None and self.upper is not None and not torch.equal(self.lower, self.upper):
            ax.fill_between(x, self.lower.numpy(), self.upper.numpy(), alpha=0.2, label="bracket")
        fit = self.log_likelihood - self.weight_penalty
        ax.semilogx(x, fit.numpy(), "--", label="log-likelihood − weight penalty")
        ax.semilogx(x, self.log_occam_factor.numpy(), ":", label="log Occam factor")
        if math.isfinite(self.best):
            ax.axvline(self.best, color="gray", linewidth=0.8)
            ax.plot(
                [self.best], [self.best_log_evidence], "o", color="C0", label=f"best, λ = {self.best:.3g}"
            )
        ax.set_xlabel("prior precision λ")
        ax.set_ylabel("nats")
        ax.legend()
        return ax


def evidence_curve(
    model: nn.Module,
    data: "DataLoader[Any] | tuple[Tensor, Tensor]",
    prior_precisions: Sequence[float] | Tensor | None = None,
    **arguments: Any,
) -> EvidenceCurve:
    """Log-evidence of a network at its present weights for many prior precisions, one λ for all parameters.

    One pass over the data and one spectrum of the curvature serve all of them; structure="blocks" takes a
    factor of its kept rows for each. With `tolerance`, the rows are kept that the smallest λ needs. With
    `num_samples` it is the curve of the sample as it is, without the correction and the standard error that
    `laplace_evidence` gives to one λ. The weights stand still: where they were trained for one λ, the curve far
    from it is not that of re-trained networks.

    Args:
        model: See `laplace_evidence`.
        data: See `laplace_evidence`.
        prior_precisions: Values of λ; None for a grid of ten a decade, three decades to either side of the
            best.
        **arguments: Others of `laplace_evidence`, such as `likelihood=` and `structure=`.

    Returns:
        An `EvidenceCurve`.

    Raises:
        ValueError: See `laplace_evidence`.
    """
    if "prior_precision" in arguments:
        raise ValueError(
            "evidence_curve() takes `prior_precisions`, the values of λ to evaluate, and not `prior_precision`."
        )
    grid = None if prior_precisions is None else _checked(prior_precisions)
    computation = Computation(prior_precision="optimize", **arguments)
    return computation.run(model, data, lambda totals: curve_of(totals, grid))


class _OneSpectrum(Curvature):
    """Answers for every prior that is one λ for all parameters, from the eigenvalues of G.

    Args:
        problem: Sizes.
        values: The eigenvalues.
        above: What the log-determinant of the whole matrix may be above at most.
        below: What it may be below at most.
    """

    searches_by_spectrum = True

    def __init__(self, problem: Problem, values: Tensor, above: float, below: float) -> None:
        super().__init__(problem)
        self._values, self._above, self._below = values, above, below

    @override
    def update(self, chunk: RowChunk) -> None:
        raise TypeError("The eigenvalues are those of all rows.")

    @override
    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        return self._values / next(iter(precision.values()))

    @override
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        values = self.spectrum(precision)
        if bool((values <= -1.0).any()):  # no minimum
            return CurvatureSummary(math.nan, (math.nan, math.nan), math.nan, 0.0)
        log_det = terms.log_det_from_eigenvalues(values, 1.0).item()
        bounds = (log_det - self._below, log_det + self._above)
        return CurvatureSummary(log_det, bounds, terms.effective_parameters(values, 1.0).item(), 0.0)


def curve_of(totals: Totals, grid: list[float] | None) -> EvidenceCurve:
    """The curve over the totals of one pass; see `evidence_curve`."""
    curved, unit = totals.curved, dict.fromkeys(totals.weights, 1.0)
    values = None if curved.chooses_rows else curved.spectrum(unit)
    if values is not None:
        unknown = 0.0 if totals.structure == "full" else math.inf
        totals = replace(totals, curved=_OneSpectrum(curved.problem, values, unknown, unknown))
        if grid is not None and not totals.likelihood.optimizes_dispersion and bool((values < 0.0).any()):
            return _evaluated(totals, grid, math.nan)
    (best,) = set(maximize_evidence(totals).precision.values())
    if grid is None and curved.costly_priors:
        grid = [best * 10**decades for decades in COSTLY_DECADES]
    if grid is None:
        steps = range(-DECADES * POINTS_PER_DECADE, DECADES * POINTS_PER_DECADE + 1)
        grid = [best * 10 ** (step / POINTS_PER_DECADE) for step in steps]
    if curved.chooses_rows:
        # What the rows of the smallest λ leave out is less at every larger one; the noise is not below its estimate.
        chosen = curved.of_chosen_rows(dict.fromkeys(unit, totals.dispersion * min(*grid, best)))
        values, width = chosen.spectrum(unit), 2.0 * (totals.method.tolerance or 0.0)
        if values is not None:
            totals = replace(totals, curved=_OneSpectrum(curved.problem, values, width, 0.0))
    return _evaluated(totals, grid, best)


def _evaluated(totals: Totals, grid: list[float], best: float) -> EvidenceCurve:
    every = [*grid, best]
    if not totals.likelihood.optimizes_dispersion:
        totals.curved.prepare([dict.fromkeys(totals.weights, totals.dispersion * value) for value in every])
    fits, summaries = zip(*(_terms(totals, value) for value in every), strict=True)
    rows = [
        (*fit, s.log_det, s.effective_parameters, s.log_det_stderr, *s.bounds)
        for fit, s in zip(fits, summaries, strict=True)
    ]
    log_likelihood, penalty, log_dets, gamma, stderr, least, most = torch.tensor(rows, dtype=torch.float64).mT
    fit = log_likelihood - penalty
    total, lower, upper = (fit - 0.5 * values for values in (log_dets, most, least))
    bounded = not bool(lower.isinf().any() or upper.isinf().any())
    vectors = min(len(s.samples) for s in summaries)  # that all λ have taken
    sampled = torch.tensor([s.samples[:vectors] for s in summaries], dtype=torch.float64)  # [K + 1, vectors]
    differences = 0.5 * (sampled - sampled[-1:])[:-1]
    return EvidenceCurve(
        prior_precisions=torch.tensor(grid, dtype=torch.float64),
        log_evidence=total[:-1],
        log_likelihood=log_likelihood[:-1],
        weight_penalty=penalty[:-1],
        log_occam_factor=-0.5 * log_dets[:-1],
        effective_parameters=gamma[:-1],
        best=best,
        best_log_evidence=total[-1].item(),
        lower=lower[:-1] if bounded else None,
        upper=upper[:-1] if bounded else None,
        log_evidence_stderr=0.5 * stderr[:-1] if vectors else None,
        difference_stderr=differences.std(1) / vectors**0.5 if vectors > 1 else None,
    )


def _terms(totals: Totals, precision: float) -> tuple[tuple[float, float], CurvatureSummary]:
    """Log-likelihood and weight penalty, and the curvature, at one λ, the noise optimized if asked for."""
    if math.isnan(precision):
        unknown = CurvatureSummary(math.nan, (math.nan, math.nan), math.nan, math.nan)
        return (math.nan, math.nan), unknown
    totals = replace(totals, prior=Prior(dict.fromkeys(totals.weights, precision)))
    taken = maximize_evidence(totals) if totals.needs_search else totals.at()
    nothing = {name: torch.zeros_like(weight) for name, weight in totals.weights.items()}
    penalty = 0.5 * precision * sum(totals.squared_norms.values())
    return (taken.log_likelihood, penalty), totals.curved.at(taken.scaled, nothing)


def _checked(prior_precisions: Sequence[float] | Tensor) -> list[float]:
    listed = prior_precisions.tolist() if isinstance(prior_precisions, Tensor) else list(prior_precisions)
    if not listed:
        raise ValueError("Expected argument `prior_precisions` to hold at least one number, got none.")
    return sorted(positive("prior_precisions", value) for value in listed)

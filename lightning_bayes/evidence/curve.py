"""The log-evidence as a curve over the prior precision, from one pass over the data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bayes.evidence.choose_prior import best_prior, fixed_weights, mean_loss
from lightning_bayes.evidence.laplace import Computation
from lightning_bayes.evidence.totals import Totals
from lightning_bayes.functional import evidence as terms
from lightning_bayes.functional._validation import positive
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.priors.at_fixed_weights import FixedWeights
from lightning_bayes.priors.prior import Prior
from lightning_bayes.priors.search import maximize_evidence
from lightning_bayes.structures.base import CurvatureSummary, SpectralCurvature
from lightning_bayes.structures.bracket.bracket import BracketCurvature
from lightning_bayes.structures.hessian import HessianCurvature

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECADES = 3
"""Of the default grid, below and above the optimum."""
POINTS_PER_DECADE = 10


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

    def conclude(totals: Totals, likelihood: Likelihood, prior: Prior) -> EvidenceCurve:
        return _curve(totals, fixed_weights(totals, likelihood, prior, mean_loss), prior, grid)

    return computation.run(model, data, conclude)


@dataclass(frozen=True)
class _OneSpectrum:
    """Answers for every prior that is one λ for all parameters, from the eigenvalues of G."""

    values: Tensor
    above: float = math.inf
    """What the log-determinant of the whole matrix may be above at most."""
    below: float = math.inf
    """What it may be below at most."""

    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        return self.values / next(iter(precision.values()))

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        raise NotImplementedError("one λ for all parameters never asks for the traces of each")

    def at(self, precision: Mapping[str, float]) -> CurvatureSummary:
        values = self.spectrum(precision)
        if bool((values <= -1.0).any()):  # no minimum
            return CurvatureSummary(math.nan, (math.nan, math.nan), math.nan, 0.0)
        log_det = terms.log_det_from_eigenvalues(values, 1.0).item()
        bounds = (log_det - self.below, log_det + self.above)
        return CurvatureSummary(log_det, bounds, terms.effective_parameters(values, 1.0).item(), 0.0)


_Answers = Callable[[Mapping[str, float]], CurvatureSummary]
"""The curvature at a prior in units of the dispersion."""


def _curve(totals: Totals, weights: FixedWeights, prior: Prior, grid: list[float] | None) -> EvidenceCurve:
    curved, unit = totals.curved, dict.fromkeys(weights.sizes, 1.0)
    known, nothing = weights, {name: torch.zeros_like(weight) for name, weight in totals.weights.items()}
    answers: _Answers = lambda precision: curved.at(precision, nothing)  # noqa: E731
    if (
        isinstance(curved, HessianCurvature)
        and grid is not None
        and not weights.likelihood.optimizes_dispersion
    ):
        values = curved.eigenvalues(unit)
        if bool((values < 0.0).any()):
            return _evaluated(replace(weights, total=None), _OneSpectrum(values, 0.0, 0.0).at, grid, math.nan)
    if isinstance(curved, SpectralCurvature | HessianCurvature) and not isinstance(curved, BracketCurvature):
        unknown = 0.0 if totals.method.structure == "full" else math.inf
        spectrum = _OneSpectrum(curved.spectrum(unit), unknown, unknown)
        known, answers = replace(weights, curved=spectrum, total=None), spectrum.at
    optimum = best_prior(known, totals, prior)
    (best,) = set(optimum.precision.values())
    if grid is None:
        steps = range(-DECADES * POINTS_PER_DECADE, DECADES * POINTS_PER_DECADE + 1)
        grid = [best * 10 ** (step / POINTS_PER_DECADE) for step in steps]
    if isinstance(curved, BracketCurvature):
        # What the rows of the smallest λ leave out is less at every larger one; the noise is not below its estimate.
        least = weights.likelihood.estimate_dispersion(weights.unit_loss, weights.num_terms) * min(
            *grid, best
        )
        kept = curved.of_kept_rows(dict.fromkeys(unit, least))
        spectrum = _OneSpectrum(kept.spectrum(unit), 2.0 * (totals.method.tolerance or 0.0), 0.0)
        known, answers = replace(weights, curved=spectrum, total=None), spectrum.at
    return _evaluated(known, answers, grid, best)


def _evaluated(known: FixedWeights, answers: _Answers, grid: list[float], best: float) -> EvidenceCurve:
    of_best = (math.nan,) * 6 if math.isnan(best) else _terms(known, answers, best)
    columns = zip(*(_terms(known, answers, value) for value in grid), of_best, strict=True)
    log_likelihood, penalty, log_dets, gamma, least, most = (
        torch.tensor(column, dtype=torch.float64) for column in columns
    )
    fit = log_likelihood - penalty
    total, lower, upper = (fit - 0.5 * values for values in (log_dets, most, least))
    bounded = not bool(lower.isinf().any() or upper.isinf().any())
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
    )


def _terms(weights: FixedWeights, answers: _Answers, precision: float) -> tuple[float, ...]:
    """Log-likelihood, weight penalty, log-determinant, γ and bounds at one λ, the noise optimized if asked for."""
    fixed = dict.fromkeys(weights.sizes, precision)
    at_precision = replace(weights, precision_at=lambda dispersion: dict(fixed))
    dispersion = maximize_evidence(at_precision, Prior(fixed)).dispersion
    summary = answers(dict.fromkeys(fixed, dispersion * precision))
    return (
        weights.likelihood.log_likelihood(weights.unit_loss, dispersion, weights.num_terms),
        0.5 * precision * sum(weights.squared_norms.values()),
        summary.log_det,
        summary.effective_parameters,
        *summary.bounds,
    )


def _checked(prior_precisions: Sequence[float] | Tensor) -> list[float]:
    listed = prior_precisions.tolist() if isinstance(prior_precisions, Tensor) else list(prior_precisions)
    if not listed:
        raise ValueError("Expected argument `prior_precisions` to hold at least one number, got none.")
    return sorted(positive("prior_precisions", value) for value in listed)

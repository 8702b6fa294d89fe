"""The prior, and the noise, of an evidence: as they were given, or those that maximise what is reported."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.evidence.totals import Totals
from lightning_bayes.functional.evidence import log_det_from_eigenvalues
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.numerics.cholesky import SMALL_ROUNDING, rounding_of_log_det
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.priors.at_fixed_weights import FixedWeights, squared_norms
from lightning_bayes.priors.common_prior import best_common_precision
from lightning_bayes.priors.prior import Prior
from lightning_bayes.priors.search import (
    Optimum,
    mackay_step,
    maximize_evidence,
    uppermost,
)
from lightning_bayes.structures.base import Curvature, SpectralCurvature
from lightning_bayes.structures.bracket.bracket import BracketCurvature
from lightning_bayes.structures.dual import DualCurvature
from lightning_bayes.structures.hessian import HessianCurvature
from lightning_bayes.structures.primal import PrimalCurvature

LARGEST_SPECTRUM = 1024
"""Rows or parameters of an exact matrix up to which a search for one λ takes all its eigenvalues. (On two cores the
eigenvalues cost ten factorisations and more, of which a search needs four.)"""
LARGEST_COMMON = 2048
"""Parameters of an exact matrix up to which all its eigenvalues are taken for the best prior alone: of G they cost
about a tenth of the evaluation. Those of K may be three times the evaluation, so rows have `LARGEST_SPECTRUM`."""
MOST_SELECTIONS = 6
"""Times that the rows of a bracket are chosen anew because the λ that was found lies below that of the choice."""

LossScale = Callable[[float, float], float]
"""From the loss's terms per example and the dispersion to s of `Prior.precision`."""


def mean_loss(terms_per_example: float, dispersion: float) -> float:
    """Return s of a loss that is the mean per-example negative log-likelihood."""
    return 1.0


def fixed_weights(
    totals: Totals,
    likelihood: Likelihood,
    prior: Prior,
    loss_scale: LossScale,
    start: Mapping[str, float] | None = None,
) -> FixedWeights:
    """What the search for a prior needs to know of the totals; see `FixedWeights.start`."""
    if totals.num_terms == 0.0:
        raise EvidenceUnavailableError("No target counts: the loss ignores them all.")
    per_example = totals.num_terms / totals.num_examples
    weights = FixedWeights(
        curved=None,
        likelihood=likelihood,
        unit_loss=totals.unit_loss,
        num_terms=totals.num_terms,
        squared_norms=squared_norms(totals.weights),
        sizes={name: weight.numel() for name, weight in totals.weights.items()},
        precision_at=lambda dispersion: prior.precision(
            totals.num_examples, loss_scale(per_example, dispersion)
        ),
        start=start,
    )
    return _of(weights, totals.curved)


def best_prior(weights: FixedWeights, totals: Totals, prior: Prior) -> Optimum:
    """The λ and the φ of an evidence.

    A bracket maximises the log-evidence that its kept rows alone would have. At the λ of their choice and at any
    above it, what they leave out is at most the tolerance, since γ of each tensor falls when rows are left out:
    the rows are chosen anew until that holds at the λ that is found.
    """
    sought = bool(prior.optimized) or weights.likelihood.optimizes_dispersion
    if not sought or not isinstance(totals.curved, BracketCurvature):
        return maximize_evidence(weights, prior)
    top = uppermost(weights, prior)
    # From above, and with rows left out, a step ends below the maximum.
    chosen = mackay_step(_of(weights, totals.curved.of_kept_rows(_scaled(top))), prior, top)
    for _ in range(MOST_SELECTIONS):
        optimum = maximize_evidence(_of(weights, totals.curved.of_kept_rows(_scaled(chosen))), prior)
        ratios = [_scaled(optimum)[name] / value for name, value in _scaled(chosen).items()]
        if min(ratios) >= 1.0 - 1e-6:
            return optimum
        chosen = optimum
    return optimum


def best_common_prior(
    weights: FixedWeights,
    totals: Totals,
    prior: Prior,
    optimum: Optimum,
    log_likelihood: float,
    log_evidence: float,
) -> tuple[float, float] | None:
    """The largest log-evidence over one λ for all parameters, and that λ, with the noise as it is.

    Returns:
        None where all eigenvalues of the structure cost more than they are worth, or there is no such λ.
    """
    precisions = set(optimum.precision.values())
    if prior.optimized and prior.rises_together:
        return log_evidence, precisions.pop()
    norm = sum(weights.squared_norms.values())
    for values in _cheap_spectra(totals.curved, dict.fromkeys(weights.sizes, 1.0)):
        accurate = values.to(accumulation_dtype(values.device))
        best = best_common_precision(accurate / optimum.dispersion, norm)
        if best is None:
            continue
        scaled = best * optimum.dispersion
        log_det = log_det_from_eigenvalues(accurate, scaled).item()
        if rounding_of_log_det(len(values) + accurate.sum().item() / scaled, values.dtype) <= SMALL_ROUNDING:
            largest = log_likelihood - 0.5 * best * norm - 0.5 * log_det
            if (
                len(precisions) == 1 and log_evidence > largest
            ):  # by rounding: at the best one it would be the same
                return log_evidence, precisions.pop()
            return largest, best
    return None


def _cheap_spectra(curved: Curvature | HessianCurvature, unit: dict[str, float]) -> Iterator[Tensor]:
    """What `_cheap_spectrum` returns, and before it the same in the model's own type where that is at hand."""
    if isinstance(curved, PrimalCurvature) and curved.problem.num_parameters <= LARGEST_COMMON:
        quick = None if curved.problem.sampled else curved.quick_spectrum(unit)
        if quick is not None:
            yield quick
    accurate = _cheap_spectrum(curved, unit)
    if accurate is not None:
        yield accurate


def _cheap_spectrum(curved: Curvature | HessianCurvature, unit: dict[str, float]) -> Tensor | None:
    """All eigenvalues of a matrix at λ = 1, None where they cost much, stand for a sample, or are negative."""
    if isinstance(curved, HessianCurvature):
        small = sum(curved.sizes.values()) <= LARGEST_COMMON
        values = curved.eigenvalues(unit) if small else None
        return None if values is None or bool((values < 0.0).any()) else values
    if not isinstance(curved, SpectralCurvature) or curved.problem.sampled:
        return None
    if isinstance(curved, PrimalCurvature) and curved.problem.num_parameters > LARGEST_COMMON:
        return None
    if isinstance(curved, DualCurvature) and curved.problem.num_rows > LARGEST_SPECTRUM:
        return None
    return curved.spectrum(unit)


def _of(weights: FixedWeights, curved: Curvature | HessianCurvature) -> FixedWeights:
    """The same weights with a curvature: by its spectrum where that is cheap, else by a factor for each prior."""
    if isinstance(curved, HessianCurvature):
        return replace(weights, curved=curved, total=None)
    if not isinstance(curved, SpectralCurvature):
        return replace(weights, curved=None, total=curved.log_det_and_gamma)
    exact = isinstance(curved, PrimalCurvature | DualCurvature)
    if exact and min(curved.problem.num_rows, curved.problem.num_parameters) > LARGEST_SPECTRUM:
        return replace(weights, curved=curved, total=curved.log_det_and_gamma)
    return replace(weights, curved=curved, total=None)


def _scaled(optimum: Optimum) -> dict[str, float]:
    """In units of the dispersion."""
    return {name: optimum.dispersion * value for name, value in optimum.precision.items()}

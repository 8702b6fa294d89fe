"""From the totals of one pass to the evidence."""

import math
import time
from collections.abc import Mapping
from typing import Any

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.evidence.choose_prior import (
    LossScale,
    best_common_prior,
    best_prior,
    fixed_weights,
    mean_loss,
)
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.evidence.totals import Totals
from lightning_bayes.functional import evidence as terms
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.priors.prior import Prior
from lightning_bayes.structures.base import CurvatureSummary
from lightning_bayes.structures.hessian import HessianCurvature


def evidence_of(
    totals: Totals,
    likelihood: Likelihood,
    prior: Prior,
    loss_scale: LossScale = mean_loss,
    start: Mapping[str, float] | None = None,
) -> Evidence:
    """The evidence at the prior and the dispersion that were given, or at those that maximise it.

    Args:
        totals: Of one pass over the data.
        likelihood: Of the targets given the outputs.
        prior: Of the parameters.
        loss_scale: Of the training loss, for a prior from weight decay.
        start: λ of each parameter where a search for them may begin.

    Raises:
        EvidenceUnavailableError: If a term overflows, or the cost has no minimum to expand about.
    """
    weights = fixed_weights(totals, likelihood, prior, loss_scale, start)
    optimum = best_prior(weights, totals, prior)
    # In units of the dispersion φ the curvature is that of the unit loss and the prior is φλ.
    scaled = {name: optimum.dispersion * value for name, value in optimum.precision.items()}
    slope = {name: totals.gradient[name] + scaled[name] * weight for name, weight in totals.weights.items()}
    summary = totals.curved.at(scaled, slope)
    log_likelihood = likelihood.log_likelihood(totals.unit_loss, optimum.dispersion, totals.num_terms)
    if not all(map(math.isfinite, (log_likelihood, summary.log_det, summary.quadratic))):
        raise EvidenceUnavailableError(
            f"The evidence overflows: log-likelihood {log_likelihood:g}, log-determinant {summary.log_det:g}, "
            f"squared Newton step {summary.quadratic:g}."
        )
    penalty = 0.5 * sum(optimum.precision[name] * norm for name, norm in weights.squared_norms.items())
    below = negative = None
    if isinstance(totals.curved, HessianCurvature):
        below, negative = totals.curved.counts(scaled)
    parts = _terms(summary, log_likelihood, penalty, totals.null_loss)
    best = best_common_prior(weights, totals, prior, optimum, log_likelihood, parts["log_evidence"])
    subset, distinct = totals.method.subset_of_weights, set(optimum.precision.values())
    return Evidence(
        **parts,
        newton_decrement=0.5 * summary.quadratic / optimum.dispersion,
        prior_precision=distinct.pop() if len(distinct) == 1 else optimum.precision,
        num_examples=totals.num_examples,
        num_parameters=sum(weights.sizes.values()),
        structure=totals.method.structure,
        curvature=totals.method.curvature,
        seconds=time.perf_counter() - totals.started,
        effective_parameters_stderr=summary.effective_parameters_stderr,
        noise_variance=optimum.dispersion if likelihood.name == "regression" else None,
        fixed_parameters=totals.held,
        log_evidence_stderr=0.5 * summary.log_det_stderr,
        prior_optimized=bool(prior.optimized),
        num_eigenvalues_below_prior=below,
        num_negative_eigenvalues=negative,
        num_samples=totals.method.num_samples,
        num_blocks=totals.method.num_blocks,
        lower_stderr=0.5 * summary.upper_stderr,
        subset_of_weights=subset if isinstance(subset, str) else tuple(subset),
        log_evidence_best_prior=None if best is None else best[0],
        best_prior_precision=None if best is None else best[1],
    )


def _terms(
    summary: CurvatureSummary, log_likelihood: float, penalty: float, null_loss: float | None
) -> dict[str, Any]:
    """The log-evidence, its bounds and its parts, by their names in `Evidence`."""

    def value(log_det: float) -> float:
        return terms.log_evidence(log_likelihood, penalty, terms.log_occam_factor(log_det))

    log_evidence = value(summary.log_det)
    return {
        "log_evidence": log_evidence,
        "lower": value(summary.bounds[1]),
        "upper": value(summary.bounds[0]),
        "log_evidence_ratio": None if null_loss is None else log_evidence + null_loss,
        "log_likelihood": log_likelihood,
        "weight_penalty": penalty,
        "log_occam_factor": terms.log_occam_factor(summary.log_det),
        "effective_parameters": summary.effective_parameters,
    }

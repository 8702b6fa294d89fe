"""From the totals of one pass to the evidence."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.evidence.search import maximize_evidence
from lightning_bayes.evidence.totals import Hyperparameters, LossReduction, Totals
from lightning_bayes.functional import evidence as terms
from lightning_bayes.numerics.cholesky import SMALL_ROUNDING, rounding_of_log_det
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.numerics.mackay_fixed_point import precision_by_spectrum


def evidence_of(
    totals: Totals, reduction: LossReduction | None = None, start: Mapping[str, float] | None = None
) -> Evidence:
    """The evidence at the prior and the dispersion that were given, or at those that maximise it.

    Args:
        totals: Of one pass over the data.
        reduction: Of the training loss, for a prior from weight decay; None for the mean of its examples.
        start: λ of each parameter where a search for them may begin.

    Raises:
        EvidenceUnavailableError: If a term overflows, or the cost has no minimum to expand about.
    """
    totals = replace(totals, reduction=reduction, start=start)
    taken = maximize_evidence(totals) if totals.needs_search else totals.at()
    # In units of the dispersion φ the curvature is that of the unit loss and the prior is φλ.
    scaled, precision, log_likelihood = taken.scaled, taken.precision, taken.log_likelihood
    slope = {name: totals.gradient[name] + scaled[name] * weight for name, weight in totals.weights.items()}
    summary = totals.curved.at(scaled, slope)
    if not all(map(math.isfinite, (log_likelihood, summary.log_det, summary.quadratic))):
        raise EvidenceUnavailableError(
            f"The evidence overflows: log-likelihood {log_likelihood:g}, log-determinant {summary.log_det:g}, "
            f"squared Newton step {summary.quadratic:g}."
        )
    # Where one λ of all parameters has been searched for, it is the best one.
    is_best = bool(totals.prior.optimized) and totals.prior.rises_together
    best = None if is_best else _best_common_prior(totals, taken)
    penalty = sum(
        terms.weight_penalty(weight.to(accumulation_dtype(weight.device)), precision[name]).item()
        for name, weight in totals.weights.items()
    )
    log_evidence, lower, upper = (
        terms.log_evidence(log_likelihood, penalty, terms.log_occam_factor(log_det))
        for log_det in (summary.log_det, summary.bounds[1], summary.bounds[0])
    )
    method, distinct = totals.method, set(precision.values())
    if is_best or (best is not None and len(distinct) == 1 and log_evidence > best[0]):
        # No λ beats the maximum: an excess is rounding.
        best = log_evidence, next(iter(distinct))
    subset = method.subset_of_weights
    return Evidence(
        log_evidence=log_evidence,
        lower=lower,
        upper=upper,
        log_evidence_ratio=None if totals.null_loss is None else log_evidence + totals.null_loss,
        log_likelihood=log_likelihood,
        weight_penalty=penalty,
        log_occam_factor=terms.log_occam_factor(summary.log_det),
        effective_parameters=summary.effective_parameters,
        newton_decrement=0.5 * summary.quadratic / taken.dispersion,
        prior_precision=distinct.pop() if len(distinct) == 1 else precision,
        num_examples=totals.num_examples,
        num_parameters=totals.curved.problem.num_parameters,
        structure=totals.structure,
        curvature=method.curvature,
        seconds=time.perf_counter() - totals.started,
        effective_parameters_stderr=summary.effective_parameters_stderr,
        noise_variance=taken.dispersion if totals.likelihood.name == "regression" else None,
        fixed_parameters=totals.held,
        log_evidence_stderr=0.5 * summary.log_det_stderr,
        prior_optimized=bool(totals.prior.optimized),
        num_eigenvalues_below_prior=summary.num_below_prior,
        num_negative_eigenvalues=summary.num_negative,
        num_samples=method.num_samples,
        num_blocks=method.num_blocks,
        newton_decrement_error=0.5 * summary.quadratic_error / taken.dispersion,
        log_evidence_dof=summary.log_det_dof,
        samples=tuple(
            terms.log_evidence(log_likelihood, penalty, terms.log_occam_factor(log_det))
            for log_det in summary.samples
        ),
        lower_stderr=0.5 * summary.upper_stderr,
        note=totals.likelihood.note,
        subset_of_weights=subset if isinstance(subset, str) else tuple(subset),
        log_evidence_best_prior=None if best is None else best[0],
        best_prior_precision=None if best is None else best[1],
    )


def _best_common_prior(totals: Totals, taken: Hyperparameters) -> tuple[float, float] | None:
    """The largest log-evidence over one λ for all parameters, and that λ, with the noise as it is.

    Returns:
        None where all eigenvalues of the structure cost more than they are worth, or there is no such λ.
    """
    norm = sum(totals.squared_norms.values())
    for values in totals.curved.cheap_spectra(dict.fromkeys(totals.weights, 1.0)):
        accurate = values.to(accumulation_dtype(values.device))
        best = precision_by_spectrum(accurate / taken.dispersion, norm)
        if best is None:
            continue
        scaled = best * taken.dispersion
        log_det = terms.log_det_from_eigenvalues(accurate, scaled).item()
        if rounding_of_log_det(len(values) + accurate.sum().item() / scaled, values.dtype) <= SMALL_ROUNDING:
            return taken.log_likelihood - 0.5 * best * norm - 0.5 * log_det, best
    return None

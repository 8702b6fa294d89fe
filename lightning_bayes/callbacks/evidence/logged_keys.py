"""What of an evidence is logged, and under which names."""

import math
from collections.abc import Mapping

from lightning_bayes.evidence.result import Evidence

UNAVAILABLE = (
    "log_evidence",
    "log_likelihood",
    "weight_penalty",
    "log_occam_factor",
    "effective_parameters",
    "newton_decrement",
)
"""Keys that are logged as NaN when an epoch has no evidence, so that curves show the gap."""

KEYS = (
    *UNAVAILABLE,
    "log_evidence_ratio",
    "log_evidence_best_prior",
    "log_evidence_stderr",
    "lower",
    "lower_stderr",
    "upper",
    "noise_variance",
    "prior_optimized",
    "prior_precision",
)
"""All keys."""


def logged_values(evidence: Evidence) -> dict[str, float]:
    """Numbers by the end of their keys; bounds where they are finite, standard errors where they are not 0."""
    names = (*UNAVAILABLE, "log_evidence_ratio", "log_evidence_best_prior", "noise_variance")
    values = {name: getattr(evidence, name) for name in names if getattr(evidence, name) is not None}
    values |= {name: bound for name in ("lower", "upper") if math.isfinite(bound := getattr(evidence, name))}
    values["prior_optimized"] = float(evidence.prior_optimized)
    if evidence.log_evidence_stderr > 0.0:
        values["log_evidence_stderr"] = evidence.log_evidence_stderr
    if evidence.lower_stderr > 0.0:
        values["lower_stderr"] = evidence.lower_stderr
    if isinstance(evidence.prior_precision, Mapping):
        distinct = dict.fromkeys(evidence.prior_precision.values())
        values |= {f"prior_precision/{i}": value for i, value in enumerate(distinct, start=1)}
    else:
        values["prior_precision"] = evidence.prior_precision
    return values

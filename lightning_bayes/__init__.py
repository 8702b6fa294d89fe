"""Bayesian evidence, SGD noise scale and scaling advice for PyTorch Lightning."""

from lightning_bayes.callbacks import GradientNoiseScale, LaplaceEvidence, ScalingAdvisor, SGDNoiseScale
from lightning_bayes.curvature.errors import EvidenceUnavailableError
from lightning_bayes.curvature.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
)
from lightning_bayes.curve import EvidenceCurve, evidence_curve
from lightning_bayes.evidence import Evidence
from lightning_bayes.laplace import laplace_evidence
from lightning_bayes.refitting import refit_prior_precision

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - grouped by subject
    # Callbacks
    "LaplaceEvidence",
    "SGDNoiseScale",
    "GradientNoiseScale",
    "ScalingAdvisor",
    # Without a Trainer
    "laplace_evidence",
    "Evidence",
    "evidence_curve",
    "EvidenceCurve",
    "refit_prior_precision",
    "EvidenceUnavailableError",
    # Likelihoods
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
]

"""Bayesian evidence, SGD noise scale and scaling advice for PyTorch Lightning."""

from lightning_bayes import earlier_modules  # noqa: F401 - registers them
from lightning_bayes.callbacks import (
    BatchSizeScheduler,
    GradientNoiseScale,
    LaplaceEvidence,
    ScalingAdvisor,
    SGDNoiseScale,
    Stability,
)
from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.evidence.curve import EvidenceCurve, evidence_curve
from lightning_bayes.evidence.laplace import laplace_evidence
from lightning_bayes.evidence.refit import refit_prior_precision
from lightning_bayes.evidence.result import Evidence
from lightning_bayes.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    NegativeLogLikelihood,
)
from lightning_bayes.loss_curvature.eigenvalue import Eigenvalue, largest_eigenvalue
from lightning_bayes.loss_curvature.stability_reading import StabilityReading

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - grouped by subject
    # Callbacks
    "LaplaceEvidence",
    "SGDNoiseScale",
    "GradientNoiseScale",
    "ScalingAdvisor",
    "BatchSizeScheduler",
    "Stability",
    "StabilityReading",
    # Without a Trainer
    "laplace_evidence",
    "Evidence",
    "evidence_curve",
    "EvidenceCurve",
    "refit_prior_precision",
    "largest_eigenvalue",
    "Eigenvalue",
    "EvidenceUnavailableError",
    # Likelihoods
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "NegativeLogLikelihood",
]

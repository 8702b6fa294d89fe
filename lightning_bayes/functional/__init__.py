"""Formulas: floats and tensors in, floats and tensors out."""

from lightning_bayes.functional.advice.advice import Advice, Move
from lightning_bayes.functional.advice.advise import advise
from lightning_bayes.functional.advice.compare import Comparison, Restoration, compare
from lightning_bayes.functional.advice.json import SavedAdvice
from lightning_bayes.functional.advice.trainer_check import trainer_check
from lightning_bayes.functional.batch_growth import BatchGrowth, grow_batch, learning_rate_gain
from lightning_bayes.functional.check import Check
from lightning_bayes.functional.configuration import AdamConfiguration, Configuration, NoSolutionError
from lightning_bayes.functional.evidence import (
    effective_parameters,
    log_det_from_eigenvalues,
    log_evidence,
    log_null_evidence,
    log_occam_factor,
    weight_penalty,
)
from lightning_bayes.functional.gradient_noise import (
    GradientNoise,
    gradient_noise_scale,
    gradient_noise_scale_from_batches,
    gradient_noise_scale_from_sums,
)
from lightning_bayes.functional.noise_scale import (
    adam_noise_scale,
    batch_size_for_noise_scale,
    learning_rate_for_noise_scale,
    sgd_noise_scale,
)
from lightning_bayes.functional.scaling import rescale, rescale_adam
from lightning_bayes.functional.sharpness import keskar_sharpness
from lightning_bayes.functional.stability import (
    largest_stable_learning_rate,
    stability_edge,
    stability_ratio,
    variance_inflation,
)

# Names from when advice for Adam had classes and a function of its own.
AdamAdvice = Advice[AdamConfiguration]
AdamMove = Move[AdamConfiguration]
GroupAdvice = Advice
advise_adam = advise

__all__ = [  # noqa: RUF022 - grouped by subject
    # Evidence
    "effective_parameters",
    "log_det_from_eigenvalues",
    "log_evidence",
    "log_null_evidence",
    "log_occam_factor",
    "weight_penalty",
    # Noise of training
    "GradientNoise",
    "adam_noise_scale",
    "batch_size_for_noise_scale",
    "gradient_noise_scale",
    "gradient_noise_scale_from_batches",
    "gradient_noise_scale_from_sums",
    "learning_rate_for_noise_scale",
    "sgd_noise_scale",
    # Stability of training
    "keskar_sharpness",
    "largest_stable_learning_rate",
    "stability_edge",
    "stability_ratio",
    "variance_inflation",
    # Rescaling
    "AdamConfiguration",
    "Configuration",
    "NoSolutionError",
    "rescale",
    "rescale_adam",
    # Growing the batch
    "BatchGrowth",
    "grow_batch",
    "learning_rate_gain",
    # Advice
    "AdamAdvice",
    "AdamMove",
    "Advice",
    "GroupAdvice",
    "Check",
    "Comparison",
    "Move",
    "Restoration",
    "SavedAdvice",
    "advise",
    "advise_adam",
    "compare",
    "trainer_check",
]

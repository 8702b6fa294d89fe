"""Lightning callbacks: they gather arguments from the Trainer, call a formula, and log."""

from lightning_bayes.callbacks.batch_size_scheduler import BatchSizeScheduler
from lightning_bayes.callbacks.gradient_noise_scale import GradientNoiseScale
from lightning_bayes.callbacks.laplace_evidence import LaplaceEvidence
from lightning_bayes.callbacks.scaling_advisor import ScalingAdvisor
from lightning_bayes.callbacks.sgd_noise_scale import SGDNoiseScale
from lightning_bayes.callbacks.stability import Stability

__all__ = [
    "BatchSizeScheduler",
    "GradientNoiseScale",
    "LaplaceEvidence",
    "SGDNoiseScale",
    "ScalingAdvisor",
    "Stability",
]

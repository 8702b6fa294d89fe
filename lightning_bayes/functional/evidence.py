"""The terms of the Laplace log-evidence, each as a formula of its own.

Everything is in nats and summed over the training set (never a mean). Reference for all of them:
Smith & Le, *A Bayesian Perspective on Generalization and Stochastic Gradient Descent*, ICLR 2018
(arXiv:1710.06451), equations 9 and 10; MacKay, *A Practical Bayesian Framework for Backpropagation
Networks*, Neural Computation 4 (1992).
"""

import math

import torch
from torch import Tensor


def weight_penalty(parameters: Tensor, prior_precision: Tensor | float) -> Tensor:
    """Cost of the weights under a zero-mean Gaussian prior, up to the prior's normalisation.

    ½ Σᵢ λᵢ ωᵢ²

    Args:
        parameters: ω, any shape.
        prior_precision: λ, one number or broadcastable to `parameters`.

    Returns:
        A scalar in nats.
    """
    return 0.5 * (prior_precision * parameters.square()).sum()


def log_det_from_eigenvalues(eigenvalues: Tensor, prior_precision: Tensor | float) -> Tensor:
    """Log-determinant that the Occam factor needs, from the spectrum of the curvature.

    ln det(I + G/λ) = Σᵢ ln(1 + γᵢ/λ)

    Args:
        eigenvalues: γᵢ ≥ 0 of G (without the prior), any shape. Zeros may be left out: they add nothing.
        prior_precision: λ > 0, one number or broadcastable to `eigenvalues`.

    Returns:
        A scalar in nats.
    """
    return torch.log1p(eigenvalues / prior_precision).sum()


def effective_parameters(eigenvalues: Tensor, prior_precision: Tensor | float) -> Tensor:
    """How many parameters the data determine rather than the prior (MacKay 1992).

    γ = Σᵢ γᵢ / (γᵢ + λ)

    Args:
        eigenvalues: γᵢ ≥ 0 of G (without the prior), any shape.
        prior_precision: λ > 0, one number or broadcastable to `eigenvalues`.

    Returns:
        A scalar between 0 and the number of eigenvalues.
    """
    return (eigenvalues / (eigenvalues + prior_precision)).sum()


def slope_in_log_precision(
    eigenvalues: Tensor, prior_precision: Tensor | float, squared_norm: float
) -> Tensor:
    """Twice the derivative of the log-evidence in ln λ at fixed weights; it vanishes at MacKay's fixed point.

    2 ∂ ln P(y|x; M) / ∂ ln λ = γ − λ‖ω‖²

    Args:
        eigenvalues: γᵢ ≥ 0 of G (without the prior), any shape.
        prior_precision: λ > 0, one number.
        squared_norm: ‖ω‖² of all parameters.

    Returns:
        A scalar in nats.
    """
    return effective_parameters(eigenvalues, prior_precision) - prior_precision * squared_norm


def log_occam_factor(log_det: float) -> float:
    """Log of the share of the prior volume that the posterior keeps.

    −½ ln det(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²), at most 0 for a positive semi-definite G.

    Args:
        log_det: ln det(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²) in nats, Λ the diagonal matrix of prior precisions.

    Returns:
        Nats.
    """
    return -0.5 * log_det


def log_evidence(log_likelihood: float, weight_penalty: float, log_occam_factor: float) -> float:
    """Laplace approximation of the log marginal likelihood of the training targets (eq. 9).

    ln P(y|x; M) ≈ ln P(y|ω, x; M) − ½ Σ λ ω² − ½ ln det(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²)

    Args:
        log_likelihood: Summed over the training examples, nats.
        weight_penalty: ½ Σ λ ω², nats.
        log_occam_factor: From `log_occam_factor`, nats.

    Returns:
        Nats, for the whole training set.
    """
    return log_likelihood - weight_penalty + log_occam_factor


def log_null_evidence(num_examples: int, num_classes: int, num_outputs: int = 1) -> float:
    """Log-evidence of the model without parameters that guesses all classes equally often (eq. 10).

    −N K ln n, the reference of the log-evidence ratio.

    Args:
        num_examples: N.
        num_classes: n, classes per output; 2 for binary outputs.
        num_outputs: K, independent outputs per example; 1 for an ordinary classifier.

    Returns:
        Nats, for the whole training set.
    """
    return -num_examples * num_outputs * math.log(num_classes)

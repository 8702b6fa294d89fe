"""Real targets with Gaussian noise: of one variance, or of a variance that the network predicts."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.functional._validation import positive
from lightning_bayes.likelihoods.base import DiagonalLikelihood, flatten_alike
from lightning_bayes.numerics.devices import accumulation_dtype


@dataclass(frozen=True)
class WeightedTargets:
    """Real targets of which some count more than others, or not at all; see `Likelihood.weighted`."""

    values: Tensor  # [N, K], anything finite where the weight is 0
    weights: Tensor  # [N, K]
    num_terms: float


class _RealLikelihood(DiagonalLikelihood):
    """A likelihood of real targets [N, K], or `WeightedTargets`."""

    @override
    def weighted(self, targets: Tensor, weights: Tensor, num_terms: float) -> WeightedTargets:
        weights = weights.reshape(targets.shape).to(targets)
        return WeightedTargets(targets.masked_fill(weights == 0, 0.0), weights, num_terms)

    @override
    def num_terms(self, outputs: Tensor, targets: Tensor | WeightedTargets) -> float:
        """N K, or what the loss divides a weighted sum by."""
        return targets.num_terms if isinstance(targets, WeightedTargets) else targets.numel()

    @override
    def num_observed(self, outputs: Tensor, targets: Tensor | WeightedTargets) -> float:
        if isinstance(targets, WeightedTargets):
            return targets.weights.double().sum().item()
        return targets.numel()


class Gaussian(_RealLikelihood):
    """Real targets with Gaussian noise, from means [N, ...]; targets of the same shape.

    Args:
        sigma: Standard deviation of the noise, in the targets' units. None: the variance is the mean
            squared residual at the weights in question, and the result reports it. "optimize": the variance
            that maximises the log-evidence, which pays for the parameters that the data determine.
    """

    name = "regression"
    torch_terms = 2.0

    def __init__(self, sigma: float | Literal["optimize"] | None = None) -> None:
        self.sigma = sigma
        self.optimizes_dispersion = sigma == "optimize"
        estimated = sigma is None or sigma == "optimize"
        self.dispersion = None if estimated else positive("sigma", sigma) ** 2

    @override
    def prepare(
        self, outputs: Tensor, targets: Tensor | WeightedTargets
    ) -> tuple[Tensor, Tensor | WeightedTargets]:
        """Both become [N, K]."""
        if isinstance(targets, WeightedTargets):
            return outputs, targets
        return flatten_alike(outputs, targets, self.name)

    @override
    def unit_loss(self, outputs: Tensor, targets: Tensor | WeightedTargets) -> Tensor:
        """½ Σ (f − y)² over examples and outputs."""
        if isinstance(targets, WeightedTargets):
            squares = targets.weights * (outputs - targets.values).square()
            return 0.5 * squares.sum(dtype=accumulation_dtype(outputs.device))
        return 0.5 * (outputs - targets).square().sum(dtype=accumulation_dtype(outputs.device))

    @override
    def sqrt_diagonal(self, outputs: Tensor, targets: Tensor | WeightedTargets) -> Tensor:
        if isinstance(targets, WeightedTargets):
            return targets.weights.sqrt()
        return torch.ones_like(outputs, requires_grad=False)

    @override
    def estimate_dispersion(self, unit_loss: float, num_terms: float) -> float:
        """σ², the mean squared residual unless it was given."""
        if self.dispersion is not None:
            return self.dispersion
        variance = 2.0 * unit_loss / num_terms
        if variance <= 0.0:
            raise EvidenceUnavailableError(
                "The residuals are all zero, so the noise variance cannot be estimated from them; give it: "
                "likelihood=Gaussian(sigma=...)."
            )
        return variance

    @override
    def log_likelihood(self, unit_loss: float, dispersion: float, num_terms: float) -> float:
        """−Σ (f − y)²/(2σ²) − ½ N K ln(2πσ²)."""
        return -unit_loss / dispersion - 0.5 * num_terms * math.log(2 * math.pi * dispersion)


class HeteroscedasticGaussian(_RealLikelihood):
    """Real targets with Gaussian noise of a predicted variance: outputs [N, 2K], K means, then K variances.

    The curvature is the Fisher information diag(1/v, 1/(2v²)) in (mean, variance): the Hessian's expectation
    over targets that the model itself would draw. The Hessian at the targets at hand, [[1/v, −r/v²],
    [−r/v², r²/v³ − 1/(2v²)]] with r = μ − y, has determinant −1/(2v³): one of its eigenvalues is
    negative whatever the residual, so it has no square root. Reference for the likelihood: Nix & Weigend,
    *Estimating the mean and variance of the target probability distribution*, ICNN 1994.

    Args:
        eps: Variances below it count as it, as in `torch.nn.functional.gaussian_nll_loss`; the gradient passes
            through.
    """

    name = "gaussian_nll"

    def __init__(self, eps: float = 1e-6) -> None:
        self.eps = positive("eps", eps)

    @override
    def prepare(
        self, outputs: Tensor, targets: Tensor | WeightedTargets
    ) -> tuple[Tensor, Tensor | WeightedTargets]:
        """Targets become [N, K]; variances are at least `eps`."""
        if isinstance(targets, WeightedTargets):
            return outputs, targets
        if outputs.dim() != 2 or outputs.shape[1] % 2 or targets.numel() * 2 != outputs.numel():
            raise ValueError(
                "A gaussian_nll likelihood needs outputs [N, 2K], K means and then K variances, beside targets "
                f"[N, K], got outputs {list(outputs.shape)} and targets {list(targets.shape)}."
            )
        mean, variance = outputs.chunk(2, dim=1)
        mean, targets = flatten_alike(mean, targets.reshape(len(targets), -1), self.name)
        lowest = variance.detach().min().item()
        if lowest < 0.0:
            raise ValueError(
                f"Expected predicted variances to be at least 0, got {lowest:g}. If the network gives their "
                "logarithm, let it end in exp()."
            )
        # The value is clamped and the gradient is not, as PyTorch has it.
        raised = (self.eps - variance.detach()).clamp(min=0.0)
        return torch.cat([mean, variance + raised], dim=1), targets

    @override
    def unit_loss(self, outputs: Tensor, targets: Tensor | WeightedTargets) -> Tensor:
        """½ Σ ln v + (μ − y)²/v over examples and outputs."""
        mean, variance = outputs.chunk(2, dim=1)
        values = targets.values if isinstance(targets, WeightedTargets) else targets
        losses = variance.log() + (mean - values).square() / variance
        if isinstance(targets, WeightedTargets):
            losses = losses * targets.weights
        return 0.5 * losses.sum(dtype=accumulation_dtype(outputs.device))

    @override
    def sqrt_diagonal(self, outputs: Tensor, targets: Tensor | WeightedTargets) -> Tensor:
        """1/√v for the means, 1/(√2 v) for the variances."""
        variance = outputs.detach().chunk(2, dim=1)[1]
        roots = torch.cat([variance.rsqrt(), math.sqrt(0.5) / variance], dim=1)
        return roots * targets.weights.sqrt().repeat(1, 2) if isinstance(targets, WeightedTargets) else roots

    @override
    def log_likelihood(self, unit_loss: float, dispersion: float, num_terms: float) -> float:
        """−½ Σ ln(2πv) + (μ − y)²/v."""
        return -unit_loss - 0.5 * num_terms * math.log(2 * math.pi)

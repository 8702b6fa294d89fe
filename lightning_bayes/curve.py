"""The log-evidence as a curve over the prior precision, from one pass over the data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bayes.curvature.likelihoods import Likelihood
from lightning_bayes.curvature.prior_search import FixedWeights, maximize_evidence
from lightning_bayes.curvature.priors import Prior
from lightning_bayes.evaluation import Totals, fixed_weights, mean_loss
from lightning_bayes.functional import evidence as terms
from lightning_bayes.functional._validation import positive
from lightning_bayes.laplace import Computation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EvidenceCurve", "evidence_curve"]

DECADES = 3
"""Of the default grid, below and above the optimum."""
POINTS_PER_DECADE = 10


@dataclass(frozen=True, eq=False)
class EvidenceCurve:
    """Log-evidence and its parts over the prior precision, at fixed weights.

    Tensors [K] in float64, in nats and summed over the examples, one entry for each prior precision.

    Attributes:
        prior_precisions: λ, ascending.
        log_evidence: log_likelihood − weight_penalty + log_occam_factor.
        log_likelihood: ln P(y | ω, x); it changes with λ only where the noise is optimized at each.
        weight_penalty: ½ λ‖ω‖².
        log_occam_factor: −½ ln det(I + G/λ).
        effective_parameters: γ = tr G(G + λ)⁻¹.
        best: The λ that maximises the log-evidence, not bound to the grid.
        best_log_evidence: The log-evidence there.
    """

    prior_precisions: Tensor
    log_evidence: Tensor
    log_likelihood: Tensor
    weight_penalty: Tensor
    log_occam_factor: Tensor
    effective_parameters: Tensor
    best: float
    best_log_evidence: float

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the curve, what fit and prior take of it, and the best λ.

        Args:
            ax: matplotlib axes; None for new ones.

        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt  # noqa: PLC0415 - only for the figure

            ax = plt.subplots(layout="constrained")[1]
        x = self.prior_precisions.numpy()
        ax.semilogx(x, self.log_evidence.numpy(), label="log-evidence", linewidth=2)
        fit = self.log_likelihood - self.weight_penalty
        ax.semilogx(x, fit.numpy(), "--", label="log-likelihood − weight penalty")
        ax.semilogx(x, self.log_occam_factor.numpy(), ":", label="log Occam factor")
        ax.axvline(self.best, color="gray", linewidth=0.8)
        ax.plot([self.best], [self.best_log_evidence], "o", color="C0", label=f"best, λ = {self.best:.3g}")
        ax.set_xlabel("prior precision λ")
        ax.set_ylabel("nats")
        ax.legend()
        return ax


def evidence_curve(
    model: nn.Module,
    data: "DataLoader[Any] | tuple[Tensor, Tensor]",
    prior_precisions: Sequence[float] | Tensor | None = None,
    **arguments: Any,
) -> EvidenceCurve:
    """Log-evidence of a network at its present weights for many prior precisions, one λ for all parameters.

    One pass over the data and one spectrum of the curvature serve all of them. The weights stand still:
    where they were trained for one λ, the curve far from it is not that of re-trained networks.

    Args:
        model: See `laplace_evidence`.
        data: See `laplace_evidence`.
        prior_precisions: Values of λ; None for a grid of ten a decade, three decades to either side of the
            best.
        **arguments: Others of `laplace_evidence`, such as `likelihood=` and `structure=`.

    Returns:
        An `EvidenceCurve`.

    Raises:
        ValueError: See `laplace_evidence`.
    """
    if "prior_precision" in arguments:
        raise ValueError(
            "evidence_curve() takes `prior_precisions`, the values of λ to evaluate, and not `prior_precision`."
        )
    if arguments.get("tolerance") is not None:
        raise ValueError("evidence_curve() has no bracket for a curve: leave `tolerance` out.")
    grid = None if prior_precisions is None else _checked(prior_precisions)
    computation = Computation(prior_precision="optimize", **arguments)

    def conclude(totals: Totals, likelihood: Likelihood, prior: Prior) -> EvidenceCurve:
        return _curve(fixed_weights(totals, likelihood, prior, mean_loss), prior, grid)

    return computation.run(model, data, conclude)


@dataclass(frozen=True)
class _OneSpectrum:
    """Answers for every prior that is one λ for all parameters, from the eigenvalues of G."""

    values: Tensor

    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        return self.values / next(iter(precision.values()))

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        raise NotImplementedError("one λ for all parameters never asks for the traces of each")


def _curve(weights: FixedWeights, prior: Prior, grid: list[float] | None) -> EvidenceCurve:
    known = replace(weights, curved=_OneSpectrum(weights.curved.spectrum(dict.fromkeys(weights.sizes, 1.0))))
    (best,) = set(maximize_evidence(known, prior).precision.values())
    if grid is None:
        steps = range(-DECADES * POINTS_PER_DECADE, DECADES * POINTS_PER_DECADE + 1)
        grid = [best * 10 ** (step / POINTS_PER_DECADE) for step in steps]
    columns = zip(*(_terms(known, value) for value in (*grid, best)), strict=True)
    log_likelihood, penalty, occam, gamma = (torch.tensor(column, dtype=torch.float64) for column in columns)
    total = log_likelihood - penalty + occam
    return EvidenceCurve(
        prior_precisions=torch.tensor(grid, dtype=torch.float64),
        log_evidence=total[:-1],
        log_likelihood=log_likelihood[:-1],
        weight_penalty=penalty[:-1],
        log_occam_factor=occam[:-1],
        effective_parameters=gamma[:-1],
        best=best,
        best_log_evidence=total[-1].item(),
    )


def _terms(weights: FixedWeights, precision: float) -> tuple[float, float, float, float]:
    """Log-likelihood, weight penalty, log Occam factor and γ at one λ, the noise optimized where asked for."""
    fixed = dict.fromkeys(weights.sizes, precision)
    at_precision = replace(weights, precision_at=lambda dispersion: dict(fixed))
    dispersion = maximize_evidence(at_precision, Prior(fixed)).dispersion
    values = weights.curved.spectrum(dict.fromkeys(fixed, dispersion * precision))
    return (
        weights.likelihood.log_likelihood(weights.unit_loss, dispersion, weights.num_terms),
        0.5 * precision * sum(weights.squared_norms.values()),
        terms.log_occam_factor(terms.log_det_from_eigenvalues(values, 1.0).item()),
        terms.effective_parameters(values, 1.0).item(),
    )


def _checked(prior_precisions: Sequence[float] | Tensor) -> list[float]:
    listed = prior_precisions.tolist() if isinstance(prior_precisions, Tensor) else list(prior_precisions)
    if not listed:
        raise ValueError("Expected argument `prior_precisions` to hold at least one number, got none.")
    return sorted(positive("prior_precisions", value) for value in listed)

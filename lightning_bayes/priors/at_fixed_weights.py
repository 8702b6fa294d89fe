"""What is known of the evidence when the weights stand still: its terms as functions of the prior."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_bayes.functional.evidence import effective_parameters, log_det_from_eigenvalues
from lightning_bayes.likelihoods import Likelihood
from lightning_bayes.numerics.devices import accumulation_dtype

Curve = Callable[[Mapping[str, float]], tuple[float, dict[str, float]]]
"""From a prior to the log-determinant and γ of each parameter tensor."""


class HasSpectrum(Protocol):
    """The two answers of a `Curvature` that the search asks for."""

    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        """Eigenvalues of P^(-½) G P^(-½)."""

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Log-determinant of I + P⁻¹G, and γ of each parameter tensor."""


@dataclass(frozen=True)
class FixedWeights:
    """What is known of the evidence when the weights stand still."""

    curved: HasSpectrum | None
    """None where there is only `total`."""
    likelihood: Likelihood
    unit_loss: float
    num_terms: float
    squared_norms: Mapping[str, float]
    """‖ω‖² of each parameter tensor that carries a prior."""
    sizes: Mapping[str, int]
    """Entries of each."""
    precision_at: Callable[[float], dict[str, float]]
    """λ of each for a dispersion φ; that of an optimized one is not used."""
    total: Callable[[Mapping[str, float]], tuple[float, float]] | None = None
    """Log-determinant and γ at a prior, where half a dozen of them cost less than a spectrum."""
    start: Mapping[str, float] | None = None
    """λ of a search that ended near, at earlier weights say."""

    @property
    def spectral(self) -> HasSpectrum:
        """The curvature.

        Raises:
            TypeError: If it has no spectrum.
        """
        if self.curved is None:
            raise TypeError(
                "This curvature answers for one prior at a time, and the search asked for a spectrum."
            )
        return self.curved


def curve_of(weights: FixedWeights, together: bool) -> Curve:
    """Log-determinant and traces as a function of the prior.

    Args:
        weights: What is known.
        together: Whether all priors are multiples of one; then only the sum of the traces is right.
    """
    if together and weights.total is None:
        return _by_spectrum(weights)
    if together and weights.total is not None:
        return _remembered(_of_first(weights.total, list(weights.sizes)))
    return _remembered(weights.spectral.log_det_and_traces)


def _of_first(total: Callable[[Mapping[str, float]], tuple[float, float]], names: Sequence[str]) -> Curve:
    """The total γ as the first tensor's: where all λ rise together only the sum is asked for."""

    def of_precision(precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        log_det, gamma = total(precision)
        return log_det, dict.fromkeys(names, 0.0) | {names[0]: gamma}

    return of_precision


def _remembered(curve: Curve) -> Curve:
    """The same, but one prior's only once."""
    known: dict[tuple[float, ...], tuple[float, dict[str, float]]] = {}

    def of_precision(precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        key = tuple(precision.values())
        if key not in known:
            known[key] = curve(precision)
        return known[key]

    return of_precision


def _by_spectrum(weights: FixedWeights) -> Curve:
    """Log-determinant and traces for all multiples of one prior, by one spectrum."""
    names = list(weights.sizes)
    shape = weights.precision_at(1.0)
    values = weights.spectral.spectrum(shape)

    def of_scale(precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        scale = precision[names[0]] / shape[names[0]]
        log_det = log_det_from_eigenvalues(values, scale).item()
        # Only sums over all parameters are asked for, so it does not matter whose the trace is.
        return log_det, dict.fromkeys(names, 0.0) | {names[0]: effective_parameters(values, scale).item()}

    return of_scale


def squared_norms(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """‖ω‖² of each tensor."""
    return {
        name: weight.square().sum(dtype=accumulation_dtype(weight.device)).item()
        for name, weight in weights.items()
    }

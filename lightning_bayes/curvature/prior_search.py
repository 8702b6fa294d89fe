"""The prior, and the noise, that the data prefer: maxima of the log-evidence at fixed weights.

With μ = φλ, U the summed unit loss and T the terms of a Gaussian likelihood,

    E(λ, φ) = −U/φ − ½ T ln 2πφ − ½ Σ λ‖ω‖² − ½ ln det(I + M⁻¹ᐟ² G M⁻¹ᐟ²),    M = diag(μ)

is concave in all ln λ and ln φ together: det(G + M) is a sum of products of the μ with the principal minors
of a positive semi-definite G, so its logarithm is a log-sum-exp of linear functions. One maximum, then, with

    ∂E/∂ ln λ_g = ½ (γ_g − λ_g ‖ω_g‖²),    ∂E/∂ ln φ = U/φ − ½ T + ½ γ

(MacKay, *Bayesian interpolation*, Neural Computation 4, 1992). No second pass over the data is needed, and
where all μ go up and down together one spectrum of G serves every λ.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.optimize import minimize, root_scalar
from torch import Tensor

from lightning_bayes.curvature.base import accumulation_dtype
from lightning_bayes.curvature.likelihoods import Likelihood
from lightning_bayes.curvature.priors import Prior
from lightning_bayes.functional.evidence import effective_parameters, log_det_from_eigenvalues

__all__ = ["FixedWeights", "Optimum", "maximize_evidence", "squared_norms"]

SEARCH_RANGE = 1e8
"""λ is sought this far below and above p/‖ω‖², which no maximum exceeds; φ likewise about its estimate."""
GRADIENT_TOLERANCE = 1e-7
"""In nats per unit of ln λ, where the search ends."""
EXACT, COARSE = 1e-12, 1e-6
"""In ln λ, where a search of one number ends: by a spectrum, or by a factorisation for each λ that is tried."""
ACCEPTED_GRADIENT = 0.1
"""Likewise, beyond which the search has failed: the maximum is some 0.01 nats away."""


_Curve = Callable[[Mapping[str, float]], tuple[float, dict[str, float]]]
"""From a prior to the log-determinant and γ of each parameter tensor."""


class HasSpectrum(Protocol):
    """The two answers of a `Curvature` that the search asks for."""

    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        """See `Curvature.spectrum`."""
        ...

    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """See `Curvature.log_det_and_traces`."""
        ...


@dataclass(frozen=True)
class FixedWeights:
    """What is known of the evidence when the weights stand still."""

    curved: HasSpectrum
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


@dataclass(frozen=True)
class Optimum:
    """Where the log-evidence is largest."""

    precision: dict[str, float]
    dispersion: float


def maximize_evidence(weights: FixedWeights, prior: Prior) -> Optimum:
    """Find the λ of `prior.optimized`, and φ where the likelihood optimizes it.

    Warns:
        UserWarning: If a λ ends at the end of the range searched: the maximum is at 0 or at infinity.

    Raises:
        EvidenceUnavailableError: If the residuals are all zero and φ is to be found.
    """
    if not prior.optimized and not weights.likelihood.optimizes_dispersion:
        dispersion = weights.likelihood.estimate_dispersion(weights.unit_loss, weights.num_terms)
        return Optimum(weights.precision_at(dispersion), dispersion)
    search = _Search(weights, prior)
    start, low, high = search.box()
    if search.size == 1:
        found = np.array([search.root(low[0], start[0], high[0])])
    else:
        result = minimize(
            lambda x: tuple(-part for part in search(x)),
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(low, high, strict=True)),
            options={"ftol": 1e-15, "gtol": GRADIENT_TOLERANCE, "maxiter": 200, "maxcor": 20},
        )
        found = search.settled(result.x, low, high)
    search.warn_of_ends(found, low, high)
    return search.optimum(found)


class _Search:
    """The log-evidence and its gradient in x = (ln λ of each group, then ln φ where it is sought)."""

    def __init__(self, weights: FixedWeights, prior: Prior) -> None:
        self._weights = weights
        self._groups = prior.optimized
        self._seeks_noise = weights.likelihood.optimizes_dispersion
        self._estimate = weights.likelihood.estimate_dispersion(weights.unit_loss, weights.num_terms)
        in_groups = {name for group in self._groups for name in group}
        self._rest = tuple(name for name in weights.sizes if name not in in_groups)
        # A prior in proportion to weight decay stays what it is in units of the noise: φλ is given.
        self._tied = self._rest if prior.per_example else ()
        together = prior.rises_together
        self._by_spectrum = together and weights.total is None
        if self._by_spectrum:
            self._curve = _curve_of(weights)
        elif together and weights.total is not None:
            self._curve = _remembered(_of_first(weights.total, list(weights.sizes)))
        else:
            self._curve = _remembered(weights.curved.log_det_and_traces)

    @property
    def size(self) -> int:
        """Numbers that are sought."""
        return len(self._groups) + self._seeks_noise

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Log-evidence without terms that do not change, and its gradient."""
        weights, optimum = self._weights, self.optimum(x)
        phi, precision = optimum.dispersion, optimum.precision
        log_det, traces = self._curve({name: phi * value for name, value in precision.items()})
        penalties = {name: precision[name] * norm for name, norm in weights.squared_norms.items()}
        value = weights.likelihood.log_likelihood(weights.unit_loss, phi, weights.num_terms)
        value -= 0.5 * (sum(penalties.values()) + log_det)
        slopes = [0.5 * sum(traces[name] - penalties[name] for name in group) for group in self._groups]
        if self._seeks_noise:
            determined = sum(traces[name] for name in precision if name not in self._tied)
            held = sum(penalties[name] for name in self._tied)
            slopes.append(weights.unit_loss / phi - 0.5 * (weights.num_terms - determined - held))
        return value, np.array(slopes)

    def root(self, low: float, start: float, high: float) -> float:
        """The one number that is sought, where its slope is zero, or the end that it runs to.

        A search of a λ begins with a bracket of two steps of MacKay's: γ falls as λ rises, so the maximum lies
        between λ ← γ/‖ω‖² taken from p/‖ω‖², which lies above it, and the same taken from there.
        """
        slopes: dict[float, float] = {}

        def slope(x: float) -> float:
            if x not in slopes:
                slopes[x] = float(self(np.array([x]))[1][0])
            return slopes[x]

        if self._groups:
            group = self._groups[0]
            norm = sum(self._weights.squared_norms[name] for name in group)
            if norm == 0.0:
                return high
            least, most = self._mackay_step(start, norm, low), start
            if least == low:
                return low
            most = min(most, self._mackay_step(least, norm, low))
        else:  # φ ≥ its estimate, from which γ takes nothing away
            least, most = start, start
            while most < high and slope(most) >= 0.0:
                least, most = most, min(most + 1.0, high)
        if slope(least) <= 0.0 or slope(most) >= 0.0:  # within rounding of one end
            return least if abs(slope(least)) < abs(slope(most)) else most
        tolerance = EXACT if self._by_spectrum else COARSE
        return float(root_scalar(slope, bracket=(least, most), method="brentq", xtol=tolerance).root)

    def _mackay_step(self, x: float, norm: float, low: float) -> float:
        """ln(γ/‖ω‖²) at ln λ = x, or `low` where γ is nothing."""
        optimum = self.optimum(np.array([x]))
        traces = self._curve({n: optimum.dispersion * value for n, value in optimum.precision.items()})[1]
        determined = sum(traces[name] for name in self._groups[0])
        return math.log(determined / norm) if determined > GRADIENT_TOLERANCE else low

    def optimum(self, x: np.ndarray) -> Optimum:
        """What x stands for."""
        phi = math.exp(x[-1]) if self._seeks_noise else self._estimate
        precision = self._weights.precision_at(phi)
        for group, log_precision in zip(self._groups, x, strict=False):
            precision |= dict.fromkeys(group, math.exp(log_precision))
        return Optimum(precision, phi)

    def box(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start, lower and upper ends. The start is MacKay's step λ ← γ/‖ω‖² from λ = p/‖ω‖²."""
        scales = [self._scale(group) for group in self._groups]
        centre = np.log([*scales, *([self._estimate] if self._seeks_noise else [])])
        reach = math.log(SEARCH_RANGE)
        start = centre.copy()
        if self.size > 1 and self._groups:
            optimum = self.optimum(centre)
            phi = optimum.dispersion
            _, traces = self._curve({name: phi * value for name, value in optimum.precision.items()})
            for i, group in enumerate(self._groups):
                determined = sum(traces[name] for name in group)
                share = determined / sum(self._weights.sizes[name] for name in group)
                start[i] += math.log(max(share, 1.0 / SEARCH_RANGE))
        return start, centre - reach, centre + reach

    def _scale(self, names: Sequence[str]) -> float:
        """p/‖ω‖²: as γ ≤ p, no maximum lies above. Of all parameters where these are zero."""
        for those in (names, list(self._weights.sizes)):
            norm = sum(self._weights.squared_norms[name] for name in those)
            if norm > 0.0:
                return sum(self._weights.sizes[name] for name in those) / norm
        return 1.0

    def settled(self, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Take to their ends the λ that the log-evidence no longer tells apart, and check the others."""
        optimum, found = self.optimum(x), x.copy()
        scaled = {name: optimum.dispersion * value for name, value in optimum.precision.items()}
        _, traces = self._curve(scaled)
        for i, group in enumerate(self._groups):
            if all(self._weights.squared_norms[name] == 0.0 for name in group):
                found[i] = high[i]
            elif sum(traces[name] for name in group) < 10 * GRADIENT_TOLERANCE:
                found[i] = low[i]
        inside = (low < found) & (found < high) & (found == x)
        steepest = np.abs(self(x)[1][inside]).max(initial=0.0)
        if steepest > ACCEPTED_GRADIENT:
            warnings.warn(
                f"The search for the prior precision ended where the log-evidence still changes by {steepest:.2g} "
                "nats per unit of ln λ: the structure's numbers are not smooth enough. A float64 model, or one λ "
                'for all parameters (prior_precision="optimize"), avoids this.',
                stacklevel=4,
            )
        return found

    def warn_of_ends(self, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Say so where the log-evidence still rises at the end of the range."""
        reach = 1e-6
        for group, value, least, most in zip(self._groups, x, low, high, strict=False):
            if least + reach < value < most - reach:
                continue
            whose = f"{list(group[:3])}" + (f" and {len(group) - 3} more" if len(group) > 3 else "")
            why = (
                "the data hold on to no direction of them (no curvature)"
                if value <= least + reach
                else "their weights are zero or as good as zero"
            )
            warnings.warn(
                f"The log-evidence still rises at the end of the range of prior precisions that is searched, "
                f"{math.exp(value):.3g} for {whose}: {why}. There is no maximum to take; give these parameters a "
                "prior precision of their own.",
                stacklevel=4,
            )


def _of_first(total: Callable[[Mapping[str, float]], tuple[float, float]], names: Sequence[str]) -> _Curve:
    """The total γ as the first tensor's: where all λ rise together only the sum is asked for."""

    def of_precision(precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        log_det, gamma = total(precision)
        return log_det, dict.fromkeys(names, 0.0) | {names[0]: gamma}

    return of_precision


def _remembered(curve: _Curve) -> _Curve:
    """The same, but one prior's only once."""
    known: dict[tuple[float, ...], tuple[float, dict[str, float]]] = {}

    def of_precision(precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        key = tuple(precision.values())
        if key not in known:
            known[key] = curve(precision)
        return known[key]

    return of_precision


def _curve_of(weights: FixedWeights) -> _Curve:
    """Log-determinant and traces for all multiples of one prior, by one spectrum."""
    names = list(weights.sizes)
    shape = weights.precision_at(1.0)
    values = weights.curved.spectrum(shape)

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

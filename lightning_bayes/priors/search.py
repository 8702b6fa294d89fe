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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, root_scalar

from lightning_bayes.numerics.mackay_fixed_point import mackay_fixed_point
from lightning_bayes.priors.at_fixed_weights import FixedWeights, curve_of
from lightning_bayes.priors.prior import Prior

SEARCH_RANGE = 1e8
"""λ is sought this far below and above p/‖ω‖², which no maximum exceeds; and φ about its estimate."""
GRADIENT_TOLERANCE = 1e-7
"""In nats per unit of ln λ, where the search ends."""
EXACT, COARSE = 1e-12, 1e-6
"""In ln φ or ln λ, where a search of one number ends: by a spectrum, or by a factorisation for each that is tried."""
ACCEPTED_GRADIENT = 0.1
"""In nats per unit of ln λ, beyond which the search has failed: the maximum is some 0.01 nats away."""


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
        at = np.array([search.root(low[0], start[0], high[0])])
    else:
        result = minimize(
            lambda x: tuple(-part for part in search(x)),
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(low, high, strict=True)),
            options={"ftol": 1e-15, "gtol": GRADIENT_TOLERANCE, "maxiter": 200, "maxcor": 20},
        )
        at = search.settled(result.x, low, high)
    search.warn_of_ends(at, low, high)
    return search.optimum(at)


def uppermost(weights: FixedWeights, prior: Prior) -> Optimum:
    """The λ of `prior.optimized` that no maximum exceeds, p/‖ω‖², and the φ that none falls below."""
    search = _Search(weights, prior, lazily=True)
    _, low, high = search.ends()
    return search.optimum(0.5 * (low + high))


def mackay_step(weights: FixedWeights, prior: Prior, optimum: Optimum) -> Optimum:
    """λ ← γ/‖ω‖² for each λ of `prior.optimized`, from an optimum or what may be one."""
    return _Search(weights, prior).step(optimum)


class _Search:
    """The log-evidence and its gradient in x = (ln λ of each group, then ln φ where it is sought)."""

    def __init__(self, weights: FixedWeights, prior: Prior, lazily: bool = False) -> None:
        self._weights = weights
        self._groups = prior.optimized
        self._seeks_noise = weights.likelihood.optimizes_dispersion
        self._estimate = weights.likelihood.estimate_dispersion(weights.unit_loss, weights.num_terms)
        in_groups = {name for group in self._groups for name in group}
        self._rest = tuple(name for name in weights.sizes if name not in in_groups)
        # A prior in proportion to weight decay stays what it is in units of the noise: φλ is given.
        self._tied = self._rest if prior.per_example else ()
        self._by_spectrum = prior.rises_together and weights.total is None
        if not lazily:
            self._curve = curve_of(weights, prior.rises_together)

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
        """The one number that is sought, where its slope is zero, or the end that it runs to."""
        if self._groups:
            norm = self._norm(self._groups[0])
            if norm == 0.0:
                return high
            if not self._by_spectrum:
                return mackay_fixed_point(self._determined, norm, start, low, high)
        slopes: dict[float, float] = {}

        def slope(x: float) -> float:
            if x not in slopes:
                slopes[x] = float(self(np.array([x]))[1][0])
            return slopes[x]

        least, most = self._bracket(slope, low, start, high)
        if slope(least) <= 0.0 or slope(most) >= 0.0:  # within rounding of one end
            return least if abs(slope(least)) < abs(slope(most)) else most
        tolerance = EXACT if self._by_spectrum else COARSE
        return float(root_scalar(slope, bracket=(least, most), method="brentq", xtol=tolerance).root)

    def _bracket(
        self, slope: Callable[[float], float], low: float, start: float, high: float
    ) -> tuple[float, float]:
        """Two numbers with the maximum in between.

        γ falls as λ rises, so that of λ lies between λ ← γ/‖ω‖² taken from p/‖ω‖², which lies above it, and the
        same taken from there.
        """
        if self._groups:
            norm = self._norm(self._groups[0])
            least = self._log_ratio(start, norm, low)
            return least, start if least == low else min(start, self._log_ratio(least, norm, low))
        least, most = start, start  # φ ≥ its estimate, from which γ takes nothing away
        while most < high and slope(most) >= 0.0:
            least, most = most, min(most + 1.0, high)
        return least, most

    def _norm(self, group: Sequence[str]) -> float:
        return sum(self._weights.squared_norms[name] for name in group)

    def _determined(self, x: float) -> float:
        """γ of the one group at ln λ = x."""
        traces = self._traces(self.optimum(np.array([x])))
        return sum(traces[name] for name in self._groups[0])

    def _traces(self, optimum: Optimum) -> dict[str, float]:
        return self._curve({name: optimum.dispersion * value for name, value in optimum.precision.items()})[1]

    def _log_ratio(self, x: float, norm: float, low: float) -> float:
        """ln(γ/‖ω‖²) at ln λ = x, or `low` where γ is nothing."""
        determined = self._determined(x)
        return math.log(determined / norm) if determined > GRADIENT_TOLERANCE else low

    def step(self, optimum: Optimum) -> Optimum:
        """MacKay's λ = γ/‖ω‖² of each group, from γ at the present optimum."""
        if not self._groups:
            return optimum
        traces, precision = self._traces(optimum), dict(optimum.precision)
        for group in self._groups:
            determined, norm = sum(traces[name] for name in group), self._norm(group)
            if determined > GRADIENT_TOLERANCE and norm > 0.0:
                precision |= dict.fromkeys(group, determined / norm)
        return Optimum(precision, optimum.dispersion)

    def optimum(self, x: np.ndarray) -> Optimum:
        """What x stands for."""
        phi = math.exp(x[-1]) if self._seeks_noise else self._estimate
        precision = self._weights.precision_at(phi)
        for group, log_precision in zip(self._groups, x, strict=False):
            precision |= dict.fromkeys(group, math.exp(log_precision))
        return Optimum(precision, phi)

    def ends(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where an earlier search ended or p/‖ω‖², then lower and upper ends."""
        scales = [self._scale(group) for group in self._groups]
        centre = np.log([*scales, *([self._estimate] if self._seeks_noise else [])])
        reach, start = math.log(SEARCH_RANGE), centre.copy()
        if self._weights.start is not None and not self._by_spectrum:
            for i, group in enumerate(self._groups):
                start[i] = math.log(self._weights.start[group[0]])
        return start, centre - reach, centre + reach

    def box(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start, lower and upper ends. The first start of several is MacKay's step λ ← γ/‖ω‖² from λ = p/‖ω‖²."""
        start, low, high = self.ends()
        if self.size > 1 and self._groups and self._weights.start is None:
            optimum = self.optimum(start)
            traces = self._traces(optimum)
            for i, group in enumerate(self._groups):
                determined = sum(traces[name] for name in group)
                share = determined / sum(self._weights.sizes[name] for name in group)
                start[i] += math.log(max(share, 1.0 / SEARCH_RANGE))
        return np.clip(start, low, high), low, high

    def _scale(self, names: Sequence[str]) -> float:
        """p/‖ω‖²: as γ ≤ p, no maximum lies above. Of all parameters where these are zero."""
        for those in (names, list(self._weights.sizes)):
            norm = sum(self._weights.squared_norms[name] for name in those)
            if norm > 0.0:
                return sum(self._weights.sizes[name] for name in those) / norm
        return 1.0

    def settled(self, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Take to their ends the λ that the log-evidence no longer tells apart, and check the others."""
        traces, kept = self._traces(self.optimum(x)), x.copy()
        for i, group in enumerate(self._groups):
            if all(self._weights.squared_norms[name] == 0.0 for name in group):
                kept[i] = high[i]
            elif sum(traces[name] for name in group) < 10 * GRADIENT_TOLERANCE:
                kept[i] = low[i]
        inside = (low < kept) & (kept < high) & (kept == x)
        steepest = np.abs(self(x)[1][inside]).max(initial=0.0)
        if steepest > ACCEPTED_GRADIENT:
            warnings.warn(
                f"The search for the prior precision ended where the log-evidence still changes by {steepest:.2g} "
                "nats per unit of ln λ: the structure's numbers are not smooth enough. A float64 model, or one λ "
                'for all parameters (prior_precision="optimize"), avoids this.',
                stacklevel=4,
            )
        return kept

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

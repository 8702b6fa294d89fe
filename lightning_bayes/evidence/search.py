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
from dataclasses import replace

import numpy as np
from scipy.optimize import minimize, root_scalar

from lightning_bayes.evidence.totals import Hyperparameters, Totals
from lightning_bayes.functional.evidence import effective_parameters, log_det_from_eigenvalues
from lightning_bayes.numerics.mackay_fixed_point import mackay_fixed_point
from lightning_bayes.structures.hessian import without_negative

SEARCH_RANGE = 1e8
"""λ is sought this far below and above p/‖ω‖², which no maximum exceeds; and φ about its estimate."""
GRADIENT_TOLERANCE = 1e-7
"""In nats per unit of ln λ, where the search ends."""
EXACT, COARSE = 1e-12, 1e-6
"""In ln φ or ln λ, where a search of one number ends: by a spectrum, or by a factorisation for each that is tried."""
ACCEPTED_GRADIENT = 0.1
"""In nats per unit of ln λ, beyond which the search has failed: the maximum is some 0.01 nats away."""
MOST_SELECTIONS = 6
"""Times that the rows of a bracket are chosen anew because the λ that was found lies below that of the choice."""


def maximize_evidence(totals: Totals) -> Hyperparameters:
    """Find the λ of `Prior.optimized`, and φ where the likelihood optimizes it.

    A structure that chooses its rows maximises the log-evidence that these alone would have. At the λ of their choice
    and at any above it, what they leave out is at most the tolerance, since γ of each tensor falls when rows are left
    out: the rows are chosen anew until that holds at the λ that is found.

    Warns:
        UserWarning: If a λ ends at the end of the range searched: the maximum is at 0 or at infinity.

    Raises:
        EvidenceUnavailableError: If the residuals are all zero and φ is to be found.
    """
    if not totals.curved.chooses_rows:
        return _Search(totals).maximum()
    chosen = _Search(totals).uppermost()
    # From above, and with rows left out, a step ends below the maximum.
    chosen = _Search(replace(totals, curved=totals.curved.of_chosen_rows(chosen.scaled))).step(chosen)
    for _ in range(MOST_SELECTIONS):
        optimum = _Search(replace(totals, curved=totals.curved.of_chosen_rows(chosen.scaled))).maximum()
        ratios = [optimum.scaled[name] / value for name, value in chosen.scaled.items()]
        if min(ratios) >= 1.0 - 1e-6:
            return optimum
        chosen = optimum
    return optimum


class _Search:
    """The log-evidence and its gradient in x = (ln λ of each group, then ln φ where it is sought)."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._norms = totals.squared_norms
        self._sizes = {name: weight.numel() for name, weight in totals.weights.items()}
        self._groups = totals.prior.optimized
        self._seeks_noise = totals.likelihood.optimizes_dispersion
        self._estimate = totals.dispersion
        in_groups = {name for group in self._groups for name in group}
        # A prior in proportion to weight decay stays what it is in units of the noise: φλ is given.
        per_example = totals.prior.per_example
        self._tied = {name for name in self._sizes if name not in in_groups} if per_example else set()
        self._together = totals.prior.rises_together
        self._by_spectrum = self._together and totals.curved.searches_by_spectrum
        self._shape = totals.at(1.0).precision
        values = totals.curved.spectrum(self._shape) if self._by_spectrum else None
        self._values = None if values is None else without_negative(values)
        self._known: dict[tuple[float, ...], tuple[float, dict[str, float]]] = {}

    def maximum(self) -> Hyperparameters:
        """Where the log-evidence is largest."""
        start, low, high = self.box()
        if self.size == 1:
            at = np.array([self.root(low[0], start[0], high[0])])
        else:
            result = minimize(
                lambda x: tuple(-part for part in self(x)),
                start,
                jac=True,
                method="L-BFGS-B",
                bounds=list(zip(low, high, strict=True)),
                options={"ftol": 1e-15, "gtol": GRADIENT_TOLERANCE, "maxiter": 200, "maxcor": 20},
            )
            at = self.settled(result.x, low, high)
        self.warn_of_ends(at, low, high)
        return self.optimum(at)

    def uppermost(self) -> Hyperparameters:
        """The λ that no maximum exceeds, p/‖ω‖², and the φ that none falls below."""
        _, low, high = self.ends()
        return self.optimum(0.5 * (low + high))

    def _log_det_and_traces(self, optimum: Hyperparameters) -> tuple[float, dict[str, float]]:
        """Log-determinant and γ of each tensor; where all λ rise together the sum stands with the first."""
        key = tuple(optimum.scaled.values())
        if key not in self._known:
            self._known[key] = self._answer(optimum.scaled)
        return self._known[key]

    def _answer(self, scaled: dict[str, float]) -> tuple[float, dict[str, float]]:
        if not self._together:
            return self._totals.curved.log_det_and_traces(scaled)
        first, *others = self._sizes
        if self._values is None:
            log_det, gamma = self._totals.curved.log_det_and_gamma(scaled)
        else:
            scale = scaled[first] / self._shape[first]
            log_det = log_det_from_eigenvalues(self._values, scale).item()
            gamma = effective_parameters(self._values, scale).item()
        return log_det, {first: gamma} | dict.fromkeys(others, 0.0)

    @property
    def size(self) -> int:
        """Numbers that are sought."""
        return len(self._groups) + self._seeks_noise

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Log-evidence without terms that do not change, and its gradient."""
        totals, optimum = self._totals, self.optimum(x)
        phi, precision = optimum.dispersion, optimum.precision
        log_det, traces = self._log_det_and_traces(optimum)
        penalties = {name: precision[name] * norm for name, norm in self._norms.items()}
        value = optimum.log_likelihood - 0.5 * (sum(penalties.values()) + log_det)
        slopes = [0.5 * sum(traces[name] - penalties[name] for name in group) for group in self._groups]
        if self._seeks_noise:
            determined = sum(traces[name] for name in precision if name not in self._tied)
            held = sum(penalties[name] for name in self._tied)
            slopes.append(totals.unit_loss / phi - 0.5 * (totals.num_observed - determined - held))
        return value, np.array(slopes)

    def root(self, low: float, start: float, high: float) -> float:
        """The one number that is sought, where its slope is zero, or the end that it runs to."""
        if self._groups:
            norm = self._norm(self._groups[0])
            if norm == 0.0:
                return high
            if not self._by_spectrum:
                return mackay_fixed_point(self._determined, norm, start, low, high)

        def slope(x: float) -> float:
            return float(self(np.array([x]))[1][0])

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
        return sum(self._norms[name] for name in group)

    def _determined(self, x: float) -> float:
        """γ of the one group at ln λ = x."""
        _, traces = self._log_det_and_traces(self.optimum(np.array([x])))
        return sum(traces[name] for name in self._groups[0])

    def _log_ratio(self, x: float, norm: float, low: float) -> float:
        """ln(γ/‖ω‖²) at ln λ = x, or `low` where γ is nothing."""
        determined = self._determined(x)
        return math.log(determined / norm) if determined > GRADIENT_TOLERANCE else low

    def step(self, optimum: Hyperparameters) -> Hyperparameters:
        """MacKay's λ = γ/‖ω‖² of each group, from γ at the present optimum."""
        if not self._groups:
            return optimum
        traces, precision = self._log_det_and_traces(optimum)[1], dict(optimum.precision)
        for group in self._groups:
            determined, norm = sum(traces[name] for name in group), self._norm(group)
            if determined > GRADIENT_TOLERANCE and norm > 0.0:
                precision |= dict.fromkeys(group, determined / norm)
        return replace(optimum, precision=precision)

    def optimum(self, x: np.ndarray) -> Hyperparameters:
        """What x stands for."""
        known = self._totals.at(math.exp(x[-1]) if self._seeks_noise else self._estimate)
        precision = dict(known.precision)
        for group, log_precision in zip(self._groups, x, strict=False):
            precision |= dict.fromkeys(group, math.exp(log_precision))
        return replace(known, precision=precision)

    def ends(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where an earlier search ended or p/‖ω‖², then lower and upper ends."""
        scales = [self._scale(group) for group in self._groups]
        centre = np.log([*scales, *([self._estimate] if self._seeks_noise else [])])
        reach, start = math.log(SEARCH_RANGE), centre.copy()
        if self._totals.start is not None and not self._by_spectrum:
            for i, group in enumerate(self._groups):
                start[i] = math.log(self._totals.start[group[0]])
        return start, centre - reach, centre + reach

    def box(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start, lower and upper ends. The first start of several is MacKay's step λ ← γ/‖ω‖² from λ = p/‖ω‖²."""
        start, low, high = self.ends()
        if self.size > 1 and self._groups and self._totals.start is None:
            _, traces = self._log_det_and_traces(self.optimum(start))
            for i, group in enumerate(self._groups):
                determined = sum(traces[name] for name in group)
                share = determined / sum(self._sizes[name] for name in group)
                start[i] += math.log(max(share, 1.0 / SEARCH_RANGE))
        return np.clip(start, low, high), low, high

    def _scale(self, names: Sequence[str]) -> float:
        """p/‖ω‖²: as γ ≤ p, no maximum lies above. Of all parameters where these are zero."""
        for those in (names, list(self._sizes)):
            norm = self._norm(those)
            if norm > 0.0:
                return sum(self._sizes[name] for name in those) / norm
        return 1.0

    def settled(self, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Take to their ends the λ that the log-evidence no longer tells apart, and check the others."""
        traces, kept = self._log_det_and_traces(self.optimum(x))[1], x.copy()
        for i, group in enumerate(self._groups):
            if self._norm(group) == 0.0:
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
                stacklevel=5,
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
                stacklevel=5,
            )

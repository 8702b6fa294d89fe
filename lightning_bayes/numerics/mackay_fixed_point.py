"""The λ at which λ‖ω‖² = γ(λ), from as few values of γ as may be.

In x = ln λ the log-evidence has the slope ½ (γ − λ‖ω‖²). MacKay's step goes to T(x) = ln γ(x) − ln ‖ω‖², whose
own slope −tr K(I + K)⁻² / tr K(I + K)⁻¹ lies between −1 and 0. So r(x) = T(x) − x falls at a rate between 1 and 2,
and has one zero. Secants of r, held to these rates, find it in three or four steps.
What that saves beside SciPy's secant method is in docs/benchmarks/worth.md. Where the eigenvalues are known γ costs
nothing, and Brent's method has the zero.
"""

import math
from collections.abc import Callable

from scipy.optimize import root_scalar
from torch import Tensor

from lightning_bayes.functional.evidence import effective_parameters, slope_in_log_precision

ACCEPTED_LOSS = 1e-6
"""Nats of the log-evidence that may still be gained where the search ends."""
TYPICAL_RATE = -1.3
"""Slope of r where nothing is known of it yet."""
STEEPEST, FLATTEST = -2.0, -1.0
"""Between which it lies."""
MAX_STEPS = 50
TOLERANCE = 1e-10
"""In ln λ, by the eigenvalues."""
NOTHING_DETERMINED = 1e-12
"""Effective parameters below which the data determine nothing, by the eigenvalues."""
NOTHING = 1e-7
"""Effective parameters at which there is no curvature to speak of."""


def mackay_fixed_point(
    gamma: Callable[[float], float], squared_norm: float, start: float, low: float, high: float
) -> float:
    """Find the x = ln λ where the log-evidence is largest, or the end of the range that it runs to.

    Args:
        gamma: γ at x.
        squared_norm: ‖ω‖² > 0.
        start: First x.
        low: Smallest x.
        high: Largest x.

    Reference: MacKay, *Bayesian interpolation*, Neural Computation 4, 1992, for the step.
    """
    x, rate = min(max(start, low), high), TYPICAL_RATE
    before: tuple[float, float] | None = None
    for _ in range(MAX_STEPS):
        determined = gamma(x)
        if determined < NOTHING:
            # Too little to take a step from. γ only grows downwards, and the zero is below: where λ‖ω‖² is as little
            # as that, either γ is more, and the search goes on from there, or there is nothing at all.
            least = min(max(math.log(NOTHING / squared_norm), low), high)
            if x <= least:
                return low
            before, x = None, least
            continue
        rest = math.log(determined / squared_norm) - x
        if before is not None and x != before[0]:
            rate = min(max((rest - before[1]) / (x - before[0]), STEEPEST), FLATTEST)
        # The slope is ½ γ (1 − e⁻ʳ) and falls by ½ γ |r'|: a parabola has the square of the one over twice the other.
        if 0.25 * determined * math.expm1(-rest) ** 2 <= ACCEPTED_LOSS * -rate:
            return x
        before = x, rest
        x = min(max(x - rest / rate, low), high)
        if x == before[0]:  # it runs to this end
            return x
    return x


def precision_by_spectrum(eigenvalues: Tensor, squared_norm: float) -> float | None:
    """The λ of −½ λ‖ω‖² − ½ Σ ln(1 + e/λ) at its maximum, where γ(λ) = λ‖ω‖²; None where there is none.

    The function is concave in ln λ and γ falls, so that λ lies between λ ← γ/‖ω‖² taken from r/‖ω‖², which lies above
    it, and r/‖ω‖² for the rank r ≥ γ.

    Args:
        eigenvalues: e ≥ 0 of G/φ.
        squared_norm: ‖ω‖² of all parameters.
    """
    rank = int((eigenvalues > 0.0).sum())
    if rank == 0 or not squared_norm > 0.0:
        return None

    def slope(x: float) -> float:
        return float(slope_in_log_precision(eigenvalues, math.exp(x), squared_norm))

    most = math.log(rank / squared_norm)
    above = slope(most)
    determined = effective_parameters(eigenvalues, math.exp(most)).item()
    if determined <= NOTHING_DETERMINED:
        return None
    least = math.log(determined / squared_norm)
    if slope(least) <= 0.0 or above >= 0.0:  # within rounding of one end
        return math.exp(least if abs(slope(least)) < abs(above) else most)
    return math.exp(float(root_scalar(slope, bracket=(least, most), method="brentq", xtol=TOLERANCE).root))

"""The one prior precision of all parameters that maximises the log-evidence at fixed weights and fixed noise."""

import math

from scipy.optimize import root_scalar
from torch import Tensor

from lightning_bayes.functional.evidence import effective_parameters

TOLERANCE = 1e-10
"""In ln λ."""
NEGLIGIBLE = 1e-12
"""Effective parameters below which the data determine nothing."""


def best_common_precision(eigenvalues: Tensor, squared_norm: float) -> float | None:
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

    def determined(x: float) -> float:
        return float(effective_parameters(eigenvalues, math.exp(x)))

    def slope(x: float) -> float:
        return determined(x) - math.exp(x) * squared_norm

    most = math.log(rank / squared_norm)
    if determined(most) <= NEGLIGIBLE:
        return None
    least = math.log(determined(most) / squared_norm)
    if slope(least) <= 0.0 or slope(most) >= 0.0:  # within rounding of one end
        return math.exp(least if abs(slope(least)) < abs(slope(most)) else most)
    return math.exp(float(root_scalar(slope, bracket=(least, most), method="brentq", xtol=TOLERANCE).root))

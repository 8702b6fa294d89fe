"""What is known exactly of I + A, and the symmetric matrix M that is left for random vectors.

ln det(I + A) = `log_det` + tr ln M, and γ = tr A(I + A)⁻¹ = `gamma` + the trace of `gamma_image`, which M⁻¹ is in.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

DECREMENT_STEPS = 100
"""Steps of conjugate gradients that the Newton decrement may take."""


class KnownPart(ABC):
    """The matrix of one prior. Vectors are [k, n].

    Attributes:
        log_det: What is known of ln det(I + A).
        gamma: What is known of γ.
        bounds: Certified, of ln det(I + A), but for rounding.
        magnitude: Sum of the numbers whose rounding `bounds` must allow for.
        least: A number that no eigenvalue of M is below.
    """

    log_det: float
    gamma: float
    bounds: tuple[float, float]
    magnitude: float
    least: float

    @abstractmethod
    def masked(self, vectors: Tensor) -> Tensor:
        """Vectors without the entries that M is the identity on and nothing is left for."""

    @abstractmethod
    def product(self, vectors: Tensor) -> Tensor:
        """M times vectors."""

    @abstractmethod
    def gamma_image(self, vectors: Tensor, solved: Tensor) -> Tensor:
        """The matrix whose trace `gamma` lacks, times vectors z for which M⁻¹z is `solved`."""

    @abstractmethod
    def quadratic_form(self, gradient: Mapping[str, Tensor], tolerance: float) -> tuple[float, float]:
        """gᵀ(G + Λ)⁻¹g from below, and what may be missing of it."""

"""What every curvature structure answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bayes.numerics.sampling_estimates import BlockSample
from lightning_bayes.rows.rows import RowBlock


@dataclass(frozen=True)
class Problem:
    """The sizes that a structure can plan with before it has seen a row."""

    shapes: Mapping[str, torch.Size]
    """Of the parameters that carry a prior."""
    num_examples: int
    """Examples expected; an estimate is enough."""
    rank: int
    """Rows per example."""
    batch_size: int
    """Examples whose rows exist at one time before a structure has taken them in."""
    kept_width: int
    """Numbers that a row is kept as beyond its batch, see `gram.kept_widths`."""
    gram_width: int
    """Multiplications of the inner product of two kept rows."""
    dtype: torch.dtype
    device: torch.device
    tolerance: float | None = None
    """Width in nats of the bracket about the log-evidence that is accepted; None for exact."""
    sampled: bool = False
    """Whether the columns of a batch are samples, of which G is the mean in expectation."""
    strengths: Mapping[str, float] | None = None
    """Λ of each parameter tensor up to one factor, where that is known beforehand."""
    scale: float = 1.0
    """The factor of `strengths` that is expected; an estimate is enough."""
    block_sample: BlockSample | None = None
    """Batches whose rows are read, None for all."""
    sought: bool = False
    """Whether prior precisions are to be found."""
    rises_together: bool = True
    """Whether every Λ that will be asked for is `strengths` times one number."""

    @property
    def num_parameters(self) -> int:
        """Entries of the parameters that carry a prior, p."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def num_rows(self) -> int:
        """Rows of V."""
        return self.num_examples * self.rank


@dataclass(frozen=True)
class CurvatureSummary:
    """Numbers of G at one prior Λ, each from the structure's own factor, estimates with standard errors."""

    log_det: float
    """ln det(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²) as the structure has it, nats."""
    bounds: tuple[float, float]
    """Certified bounds on the log-determinant of the *whole* G: equal where the structure is exact."""
    effective_parameters: float
    """tr G(G + Λ)⁻¹."""
    quadratic: float
    """gᵀ(G + Λ)⁻¹g for the gradient g that was given."""
    log_det_stderr: float = 0.0
    """0 where nothing is sampled."""
    effective_parameters_stderr: float = 0.0
    """0 where the trace is exact."""
    upper_stderr: float = 0.0
    """Of the upper bound where it is an estimate from sampled blocks; 0 where it is certain."""


class Curvature(ABC):
    """One view of G = VᵀV, built from its rows block by block.

    Laws: the order and the size of the blocks do not matter; the other methods may be called for any number
    of priors once all blocks are in. λ > 0 for each parameter tensor; a mapping from names holds them.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @abstractmethod
    def update(self, block: RowBlock) -> None:
        """Take in the rows of one batch, or of some columns of it."""

    @abstractmethod
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """Answer for one prior.

        Args:
            precision: λ of each parameter tensor.
            gradient: g of each parameter tensor, in its shape.
        """

    def log_det_and_gamma(self, precision: Mapping[str, float]) -> tuple[float, float]:
        """The log-determinant of `at`, and γ, which is minus its derivative in ln s for the prior s·Λ."""
        nothing = {
            name: torch.zeros(shape, device=self.problem.device)
            for name, shape in self.problem.shapes.items()
        }
        summary = self.at(precision, nothing)
        return summary.log_det, summary.effective_parameters


class SpectralCurvature(Curvature):
    """A view that also answers for every multiple of a prior at once, and for each parameter tensor by itself."""

    @abstractmethod
    def spectrum(self, precision: Mapping[str, float]) -> Tensor:
        """Eigenvalues of Λ⁻¹ᐟ² G Λ⁻¹ᐟ², in any order; zeros may be left out.

        With them the log-determinant for the prior s·Λ is Σ ln(1 + e/s), for every s at no cost.
        """

    @abstractmethod
    def log_det_and_traces(self, precision: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Log-determinant for one prior, and γ of each parameter tensor.

        γᵢ = pᵢ − λᵢ trᵢ (G + Λ)⁻¹, the trace over the entries of tensor i. ∂ ln det / ∂ ln λᵢ = −γᵢ.
        """

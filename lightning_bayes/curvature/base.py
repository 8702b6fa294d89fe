"""What every curvature structure answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_bayes.curvature.rows import RowBlock

__all__ = ["Curvature", "CurvatureSummary", "Problem", "accumulation_dtype"]


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
    """Numbers that a row is kept as beyond its batch, see `rows.kept_width`."""
    dtype: torch.dtype
    device: torch.device

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
    """Numbers of G at one prior Λ; the effective parameters with the standard error of their estimate."""

    log_det: float
    """ln det(I + Λ⁻¹ᐟ² G Λ⁻¹ᐟ²), nats."""
    effective_parameters: float
    """tr G(G + Λ)⁻¹."""
    effective_parameters_stderr: float
    """0 where the trace is exact."""
    quadratic: float
    """gᵀ(G + Λ)⁻¹g for the gradient g that was given."""


class Curvature(ABC):
    """One view of G = VᵀV, built from its rows block by block.

    Laws: the order and the size of the blocks do not matter; `at` may be called for any number of priors
    once all blocks are in.
    """

    exact: ClassVar[bool] = False
    """Whether the structure keeps the whole G."""
    lower_bounds_evidence: ClassVar[bool] = False
    """Whether its log-determinant is never below that of the whole G."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @abstractmethod
    def update(self, block: RowBlock) -> None:
        """Take in the rows of one batch."""

    @abstractmethod
    def at(self, precision: Mapping[str, float], gradient: Mapping[str, Tensor]) -> CurvatureSummary:
        """Answer for one prior.

        Args:
            precision: λ > 0 of each parameter tensor.
            gradient: g of each parameter tensor, in its shape.
        """


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it: sums over a whole training set lose digits in float32."""
    return torch.float32 if device.type == "mps" else torch.float64

"""Any loss that is a sum over examples, by its second-order expansion in the outputs of one batch."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.errors import EvidenceUnavailableError, check_finite
from lightning_bayes.likelihoods.base import Likelihood, check_root_fits
from lightning_bayes.numerics.devices import accumulation_dtype

MOST_OUTPUTS = 512
"""Outputs of an example up to which its Hessian [K, K] is formed."""
NEGATIVE = 1e3
"""Rounding, in units of the type's, that an eigenvalue may be negative by, beside the largest of the batch."""
GENERALISED = (
    "The loss is not known to be a normalised likelihood: what is scored is the generalised evidence of exp(-loss), "
    "without a ratio against guessing; compare runs of the same loss alone"
)


@dataclass(frozen=True)
class Expansion:
    """A summed loss to second order in the outputs [N, K] of one batch, at these outputs.

    Attributes:
        value: Summed over the examples, with every constant that is known.
        gradient: [N, K].
        hessian: Of each example, [N, K, K].
        num_terms: What the loss that training minimises divides the sum by.
        num_observed: Summed weights of the terms.
        information: Fisher's, [N, K, K], in the place of the Hessian for the Gauss-Newton matrix; None for that.
    """

    value: float
    gradient: Tensor
    hessian: Tensor
    num_terms: float
    num_observed: float
    information: Tensor | None = None

    @cached_property
    def root(self) -> Tensor:
        """Columns [K, N, K] of a square root of what the Gauss-Newton matrix is made of.

        Raises:
            EvidenceUnavailableError: If some example's has a negative eigenvalue.
        """
        matrix = self.hessian if self.information is None else self.information
        return root_of(matrix, self.gradient)


class LocalExpansion(Likelihood):
    """What the evidence needs to know of a loss that has no likelihood of its own here, read from its graph.

    Its targets are an `Expansion`, one for each batch and good at its outputs alone: value and first two derivatives
    there are those of the loss, whatever path they are taken along.

    Args:
        note: What is scored, as a sentence; None where the loss is the negative log-density of the targets.
    """

    name = "expansion"

    def __init__(self, note: str | None = GENERALISED) -> None:
        self.note = note

    @override
    def prepare(self, outputs: Tensor, targets: Expansion) -> tuple[Tensor, Expansion]:
        return outputs, targets

    @override
    def unit_loss(self, outputs: Tensor, targets: Expansion) -> Tensor:
        """Value + ⟨g, δ⟩ + ½ δᵀHδ with δ = f − f, whose derivatives alone are not zero."""
        change = outputs - outputs.detach()
        slopes = targets.gradient + 0.5 * torch.einsum("nij,nj->ni", targets.hessian, change)
        return targets.value + (slopes * change).sum(dtype=accumulation_dtype(outputs.device))

    @override
    def sqrt_hessian(self, outputs: Tensor, targets: Expansion) -> Tensor:
        """Columns [K, N, K] by the eigenvectors of each example's Hessian."""
        check_root_fits(outputs.shape[1], outputs)
        return targets.root

    @override
    def num_terms(self, outputs: Tensor, targets: Expansion) -> float:
        """What the training loss divides the sum over this batch by."""
        return targets.num_terms

    @override
    def num_observed(self, outputs: Tensor, targets: Expansion) -> float:
        return targets.num_observed


def root_of(matrices: Tensor, scale: Tensor) -> Tensor:
    """Columns [K, N, K] of a square root of each of N positive semi-definite matrices [N, K, K].

    Args:
        matrices: Symmetric but for rounding.
        scale: Other numbers of the same computation; what is small beside them is rounding.

    Raises:
        EvidenceUnavailableError: If an eigenvalue is negative, or an entry is not finite.
    """
    check_finite(matrices, "the second derivative of the loss in the outputs")
    values, vectors = torch.linalg.eigh(
        0.5 * (matrices + matrices.mT).to(accumulation_dtype(matrices.device))
    )
    largest = max(values.abs().max().item(), scale.abs().max().item()) if len(values) else 0.0
    lowest = values.min().item() if len(values) else 0.0
    if lowest < -NEGATIVE * torch.finfo(matrices.dtype).eps * largest:
        raise IndefiniteLossError(lowest, values.max().item())
    root = vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)
    columns: Tensor = root.permute(2, 0, 1).to(matrices.dtype)
    return columns


class IndefiniteLossError(EvidenceUnavailableError):
    """The loss of an example is not convex in its outputs, at these."""

    def __init__(self, lowest: float, highest: float) -> None:
        super().__init__(
            f"The loss of an example is not convex in the outputs: its second derivative there has the eigenvalue "
            f"{lowest:.4g} (the largest is {highest:.4g}), so that there is no Gauss-Newton matrix."
        )
        self.lowest = lowest

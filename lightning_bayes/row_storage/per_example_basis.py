"""The rows of a dual in the eigenbasis of each example, and how few of them a bound needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bayes.row_storage.stored import KeptRows


@dataclass(frozen=True)
class PrincipalRows:
    """Rows Σ_c U[n, c, i] v₍ₙ,c₎ with U the eigenvectors of the examples' own blocks of K, numbered i·N + n."""

    layers: Sequence[KeptRows]  # [C, N, ...]
    eigenvalues: Tensor  # [C·N] float64: K_ii

    def pick(self, rows: Tensor) -> list[KeptRows]:
        """Some rows, by their numbers, as [1, R]."""
        return selected(self.layers, rows)

    def by_example(self, rows: Tensor) -> Tensor:
        """The order that puts rows, given by their numbers, by example: those that are near then share inputs."""
        return (rows % self.layers[0].rows.shape[1]).argsort()


def smallest_set(residual: Tensor, width: float) -> Tensor:
    """Indices of S, as small as it may be for Σ_{i∉S} ln(1 + residual_i) to be `width` at most; one at least."""
    ascending, order = residual.sort()
    dropped = int((ascending.log1p().cumsum(0) <= width).sum())
    return order[min(dropped, len(order) - 1) :]


def selected(layers: Sequence[KeptRows], rows: Tensor) -> list[KeptRows]:
    """Some rows, numbered column by column, as [1, R]."""
    examples = layers[0].rows.shape[1]
    return [layer.select(rows // examples, rows % examples) for layer in layers]


def principal_rows(layers: Sequence[KeptRows], grams: Tensor) -> PrincipalRows:
    """Turn each example's rows so that they are orthogonal.

    Args:
        layers: V, [C, N, ...].
        grams: K between the rows of each example, [N, C, C] float64.
    """
    eigenvalues, rotations = torch.linalg.eigh(grams)
    diagonal = eigenvalues.clamp_(min=0.0).mT.flatten()
    return PrincipalRows([layer.rotate(rotations) for layer in layers], diagonal)

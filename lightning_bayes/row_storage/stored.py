"""Rows that are kept beyond their batch: inner products between them, share by share of K = V Λ⁻¹ Vᵀ.

A kept layer holds rows of many examples, indexed [column, example]. As they are, its share is ⟨v₍ₙ,c₎, v₍ₘ,d₎⟩/λ;
`factored` has linear maps, whose rows need not be written down, and `collector` says which way a layer goes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True)
class KeptRows(ABC):
    """The rows of one layer for all examples seen, or a selection of them."""

    rows: Tensor  # [C, N, p] or, for a linear map, its output gradients [C, N, T, out]

    @property
    def num_rows(self) -> int:
        """C·N."""
        return self.rows.shape[0] * self.rows.shape[1]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Parameters that the rows belong to."""

    @abstractmethod
    def parts(self, num_rows: int) -> Iterator["KeptRows"]:
        """The rows in pieces of their length, for so many rows at a time; the shares of K add up."""

    @abstractmethod
    def cross(self, other: Any, precision: Mapping[str, float]) -> Tensor:
        """Share of K between these rows and others of the same layer: [C·N, C'·N'], column by column."""

    @abstractmethod
    def example_grams(self, precision: Mapping[str, float]) -> Tensor:
        """Share of K between the rows of each single example: [N, C, C]."""

    @abstractmethod
    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Inner products [k, C, N] of every row with k vectors, given per parameter as [k, *its own shape]."""

    @abstractmethod
    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Σ over rows of coefficient × row for k sets of coefficients [k, C, N], as [k, *shape] of each parameter."""

    @abstractmethod
    def examples(self, some: slice) -> Self:
        """A range of the second dimension."""

    @abstractmethod
    def select(self, columns: Tensor, examples: Tensor) -> Self:
        """Single rows as [1, R]."""

    @abstractmethod
    def merge(self, others: Sequence[Self], dim: int) -> Self:
        """These rows followed by others: of other columns (0) or of other examples (1)."""

    @abstractmethod
    def blank(self, num_examples: int) -> Self:
        """Rows of zeros of so many other examples, for a batch that does not use the layer."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """Return the rows in another floating type."""

    def widen(self, columns: int) -> Self:
        """These rows with rows of zeros up to so many columns: neither det(I + K) nor tr K(I + K)⁻¹ changes."""
        missing = columns - len(self.rows)
        if missing == 0:
            return self
        zeros = self.rows.new_zeros(missing, *self.rows.shape[1:])
        return replace(self, rows=torch.cat([self.rows, zeros]))

    def rotate(self, rotations: Tensor) -> Self:
        """Rows Σ_c R[n, c, d] v₍ₙ,c₎ for orthogonal R [N, C, C]: K only changes its basis."""
        flat = self.rows.flatten(2).transpose(0, 1)  # [N, C, ...]
        rotated = (rotations.to(flat).mT @ flat).transpose(0, 1)  # a view: single rows are taken from it
        return replace(self, rows=rotated.unflatten(2, self.rows.shape[2:]))


@dataclass(frozen=True)
class KeptDense(KeptRows):
    """The rows of one parameter as they are."""

    name: str
    shape: torch.Size

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def parts(self, num_rows: int) -> Iterator[KeptRows]:
        """Yield the rows, in one piece."""
        yield self

    @override
    def cross(self, other: Self, precision: Mapping[str, float]) -> Tensor:
        return (self.rows.flatten(0, 1) @ other.rows.flatten(0, 1).mT).div_(precision[self.name])

    @override
    def example_grams(self, precision: Mapping[str, float]) -> Tensor:
        rows = self.rows.transpose(0, 1)
        return rows @ rows.mT / precision[self.name]

    @override
    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        own = vectors[self.name]
        products = self.rows.flatten(0, 1) @ own.reshape(len(own), self.rows.shape[2]).mT
        whole: Tensor = products.mT.unflatten(1, self.rows.shape[:2])
        return whole

    @override
    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        sums = coefficients.flatten(1) @ self.rows.flatten(0, 1)
        return {self.name: sums.reshape(len(sums), *self.shape)}

    @override
    def examples(self, some: slice) -> Self:
        return replace(self, rows=self.rows[:, some])

    @override
    def select(self, columns: Tensor, examples: Tensor) -> Self:
        return replace(self, rows=self.rows[columns, examples].unsqueeze(0))

    @override
    def blank(self, num_examples: int) -> Self:
        return replace(self, rows=self.rows.new_zeros(len(self.rows), num_examples, self.rows.shape[2]))

    @override
    def merge(self, others: Sequence[Self], dim: int) -> Self:
        return replace(self, rows=torch.cat([self.rows, *(other.rows for other in others)], dim=dim))

    @override
    def to(self, dtype: torch.dtype) -> Self:
        return replace(self, rows=self.rows.to(dtype))

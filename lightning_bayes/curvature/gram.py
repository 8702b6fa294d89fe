"""Rows that are kept for the dual: inner products between them without ever writing V down.

A kept layer holds the rows of all N examples, indexed [column, example]. Its share of K = V Λ⁻¹ Vᵀ is

- linear layer: ⟨v₍ₙ,c₎, v₍ₘ,d₎⟩ = ⟨g₍ₙ,c₎, g₍ₘ,d₎⟩ (⟨aₙ, aₘ⟩/λ_weight + 1/λ_bias),
- any other:    ⟨v₍ₙ,c₎, v₍ₘ,d₎⟩/λ from the rows themselves.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lightning_bayes.curvature.rows import OuterRows, Rows

__all__ = ["KeptRows", "combine_all", "dot_all", "fill_gram", "keep", "tiles_of"]


@dataclass(frozen=True)
class KeptRows(ABC):
    """The rows of one layer for all examples seen."""

    rows: Tensor  # [C, N, p] or, for a linear layer, its output gradients [C, N, out]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Parameters that the rows belong to."""

    @abstractmethod
    def gram_factor(self, left: slice, right: slice, precision: Mapping[str, float]) -> Tensor | float:
        """What multiplies ⟨rows, rows⟩: a number, or one for each pair of examples [left, right]."""

    @abstractmethod
    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Inner products [C, N] of every row with one vector, given per parameter in its own shape."""

    @abstractmethod
    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Σ over rows of coefficient × row for coefficients [C, N], in the parameters' shapes."""

    @classmethod
    @abstractmethod
    def merge(cls, blocks: Sequence[Self]) -> Self:
        """One layer's rows of several batches, put together."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """The same rows in another floating type."""


@dataclass(frozen=True)
class _KeptOuter(KeptRows):
    inputs: Tensor  # [N, in]
    weight: str | None
    bias: str | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def gram_factor(self, left: slice, right: slice, precision: Mapping[str, float]) -> Tensor | float:
        from_bias = 0.0 if self.bias is None else 1.0 / precision[self.bias]
        if self.weight is None:
            return from_bias
        return (self.inputs[left] @ self.inputs[right].mT).div_(precision[self.weight]).add_(from_bias)

    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        outputs = self.inputs.new_zeros(())
        if self.weight is not None:
            outputs = outputs + self.inputs @ vectors[self.weight].mT  # [N, out]
        if self.bias is not None:
            outputs = outputs + vectors[self.bias]
        return (self.rows * outputs).sum(2)

    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        weighted = torch.einsum("cn,cno->no", coefficients, self.rows)
        sums = {}
        if self.weight is not None:
            sums[self.weight] = weighted.mT @ self.inputs
        if self.bias is not None:
            sums[self.bias] = weighted.sum(0)
        return sums

    @classmethod
    def merge(cls, blocks: Sequence[Self]) -> Self:
        rows = torch.cat([block.rows for block in blocks], dim=1)
        inputs = torch.cat([block.inputs for block in blocks])
        return cls(rows, inputs, blocks[0].weight, blocks[0].bias)

    def to(self, dtype: torch.dtype) -> Self:
        return type(self)(self.rows.to(dtype), self.inputs.to(dtype), self.weight, self.bias)


@dataclass(frozen=True)
class _KeptDense(KeptRows):
    name: str
    shape: torch.Size

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def gram_factor(self, left: slice, right: slice, precision: Mapping[str, float]) -> Tensor | float:
        return 1.0 / precision[self.name]

    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return self.rows @ vectors[self.name].flatten()

    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        return {self.name: torch.einsum("cn,cnp->p", coefficients, self.rows).reshape(self.shape)}

    @classmethod
    def merge(cls, blocks: Sequence[Self]) -> Self:
        return cls(torch.cat([block.rows for block in blocks], dim=1), blocks[0].name, blocks[0].shape)

    def to(self, dtype: torch.dtype) -> Self:
        return type(self)(self.rows.to(dtype), self.name, self.shape)


def keep(layer: Rows) -> list[KeptRows]:
    """Keep a layer's rows beyond their batch: factored where they have factors."""
    if isinstance(layer, OuterRows) and (inputs := layer.inputs()).shape[1] == 1:
        return [_KeptOuter(layer.grads().squeeze(2), inputs.squeeze(1), layer.weight, layer.bias)]
    shapes = (
        {layer.weight: layer.weight_shape, layer.bias: layer.weight_shape[:1]}
        if isinstance(layer, OuterRows)
        else {layer.name: layer.shape}
    )
    return [_KeptDense(rows, name, shapes[name]) for name, rows in layer.dense().items()]


def tiles_of(num_examples: int, columns: int, tile_rows: int) -> list[slice]:
    """Ranges of examples whose rows make tiles of about `tile_rows`."""
    step = max(1, tile_rows // columns)
    return [slice(start, min(start + step, num_examples)) for start in range(0, num_examples, step)]


def fill_gram(
    buffer: Tensor, layers: Sequence[KeptRows], tiles: Sequence[slice], precision: Mapping[str, float]
) -> None:
    """Write the upper triangle of K = V Λ⁻¹ Vᵀ into `buffer` [rows, rows], tile by tile.

    The rows of a tile stand column by column, each over the tile's examples, so that the factor of a
    linear layer broadcasts over contiguous memory. The order of rows is immaterial to every answer.
    """
    columns = layers[0].rows.shape[0]
    per_tile = [[layer.rows[:, tile].flatten(0, 1) for tile in tiles] for layer in layers]
    for i, left in enumerate(tiles):
        for j in range(i, len(tiles)):
            right = tiles[j]
            target = buffer[_row_range(left, columns), _row_range(right, columns)]
            for k, (layer, rows) in enumerate(zip(layers, per_tile, strict=True)):
                share = torch.mm(rows[i], rows[j].mT, out=target) if k == 0 else rows[i] @ rows[j].mT
                factor = layer.gram_factor(left, right, precision)
                if isinstance(factor, Tensor):
                    factor = factor.unsqueeze(1)  # [left, 1, right] against [C, left, C, right]
                share.unflatten(1, (columns, -1)).unflatten(0, (columns, -1)).mul_(factor)
                if k > 0:
                    target += share


def _row_range(tile: slice, columns: int) -> slice:
    return slice(tile.start * columns, tile.stop * columns)


def dot_all(layers: Sequence[KeptRows], vectors: Mapping[str, Tensor]) -> Tensor:
    """V times a vector, as [C, N]."""
    return torch.stack([layer.dot(vectors) for layer in layers]).sum(0)


def combine_all(layers: Sequence[KeptRows], coefficients: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Vᵀ times coefficients [C, N], parameter by parameter."""
    for layer in layers:
        yield from layer.combine(coefficients).items()

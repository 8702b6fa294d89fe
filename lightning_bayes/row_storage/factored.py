"""The rows of a linear map, kept as their factors: inner products without writing V down.

At T positions its share of K = V Λ⁻¹ Vᵀ is Σₜₛ ⟨g₍ₙ,c,t₎, g₍ₘ,d,s₎⟩ (⟨a₍ₙ,t₎, a₍ₘ,s₎⟩/λ_weight + 1/λ_bias). The pairs
of positions are worth their T² only at few positions. Where they are not, the factors may still be smaller than the
rows, which are then formed some output channels at a time.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_bayes.row_storage.stored import KeptDense, KeptRows

PART_NUMBERS = 2**25
"""Numbers of rows, or of products of positions, that are formed at one time."""


@dataclass(frozen=True)
class KeptOuter(KeptRows):
    """A linear map at T positions, kept as its factors.

    Attributes:
        paired: Whether inner products go by pairs of positions.
        owners: [N] into `inputs` where single rows were selected; None where the examples are those of `inputs`.
    """

    inputs: Tensor  # [n, T, in]
    weight: str | None
    bias: str | None
    weight_shape: torch.Size
    paired: bool
    owners: Tensor | None = None

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def parts(self, num_rows: int) -> Iterator[KeptRows]:
        """Yield some output channels at a time, then the bias."""
        if self.paired:
            yield self
            return
        if self.weight is not None:
            inputs = self._own_inputs()
            step = max(1, PART_NUMBERS // (num_rows * inputs.shape[2]))
            for start in range(0, self.rows.shape[3], step):
                some = self.rows[..., start : start + step]
                yield KeptDense((some.mT @ inputs).flatten(2), self.weight, self.weight_shape)
        if self.bias is not None:
            yield KeptDense(self.rows.sum(2), self.bias, self.weight_shape[:1])

    @override
    def cross(self, other: Self, precision: Mapping[str, float]) -> Tensor:
        if not self.paired:
            larger = max(self.num_rows, other.num_rows)
            both = zip(self.parts(larger), other.parts(larger), strict=True)
            return _sum(left.cross(right, precision) for left, right in both)
        positions = self.rows.shape[2]
        if positions == 1:
            return self._paired(other, precision).flatten(2, 3).flatten(0, 1)
        if self.num_rows > other.num_rows:  # what is cut up below is the larger
            return other.cross(self, precision).mT
        step = max(1, PART_NUMBERS // (self.num_rows * len(other.rows) * positions**2))
        pieces = [
            self._paired(other.examples(slice(start, start + step)), precision)
            for start in range(0, other.rows.shape[1], step)
        ]
        return torch.cat(pieces, dim=3).flatten(2, 3).flatten(0, 1)

    def _paired(self, other: Self, precision: Mapping[str, float]) -> Tensor:
        """Share of K as [C, N, C', N']."""
        (c, n, t, _), (d, m, s, _) = self.rows.shape, other.rows.shape
        share = (self.rows.flatten(0, 2) @ other.rows.flatten(0, 2).mT).view(c, n * t, d, m * s)
        if self.weight is None:
            share.mul_(self._from_bias(precision))
        else:
            factor = (self.inputs.flatten(0, 1) @ other.inputs.flatten(0, 1).mT).div_(precision[self.weight])
            if self.bias is not None:
                factor.add_(self._from_bias(precision))
            # Columns first, while the rows are few: entries of columns are gathered one by one, rows whole.
            factor = _picked(_picked(factor, other.owners, s, 1), self.owners, t, 0)
            share.mul_(factor.unsqueeze(1))
        return share if t == s == 1 else share.view(c, n, t, d, m, s).sum((2, 5))

    def _own_inputs(self) -> Tensor:
        """[N, T, in], also of selected rows."""
        return self.inputs if self.owners is None else self.inputs[self.owners]

    def _from_bias(self, precision: Mapping[str, float]) -> float:
        return 0.0 if self.bias is None else 1.0 / precision[self.bias]

    @override
    def example_grams(self, precision: Mapping[str, float]) -> Tensor:
        c, n, t, out = self.rows.shape
        pieces = []
        numbers = (c * t) ** 2 if self.paired else c * out * self.inputs.shape[2]
        step = max(1, PART_NUMBERS // numbers)
        for start in range(0, n, step):
            some = self.examples(slice(start, start + step))
            pieces.append(
                some._paired_grams(precision)
                if self.paired
                else _sum(part.example_grams(precision) for part in some.parts(some.num_rows))
            )
        return torch.cat(pieces)

    def _paired_grams(self, precision: Mapping[str, float]) -> Tensor:
        c, n, t, _ = self.rows.shape
        rows = self.rows.transpose(0, 1).flatten(1, 2)
        share = (rows @ rows.mT).view(n, c, t, c, t)
        factor = self.inputs.new_tensor(self._from_bias(precision))
        if self.weight is not None:
            inputs = self._own_inputs()
            factor = factor + (inputs @ inputs.mT / precision[self.weight]).view(n, 1, t, 1, t)
        return (share * factor).sum((2, 4))

    @override
    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        biases = None if self.bias is None else vectors[self.bias]
        if self.weight is not None:  # what the vectors make of the inputs: [N, T, k, out]
            maps = vectors[self.weight].flatten(2)
            each = None if biases is None else biases.flatten()
            outputs = F.linear(self._own_inputs(), maps.flatten(0, 1), each).unflatten(2, maps.shape[:2])
        else:
            outputs = vectors[self.names[0]]
        _, n, t, out = self.rows.shape
        seen = outputs.expand(n, t, -1, out).transpose(2, 3).flatten(1, 2)  # [N, T·out, k]
        # A product for each example, [C, T·out] times [T·out, k]: half the time of what einsum makes of it.
        return torch.bmm(self.rows.flatten(2).transpose(0, 1), seen).permute(2, 1, 0)

    @override
    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        k, (_, n, t, out) = len(coefficients), self.rows.shape
        weighted = torch.bmm(coefficients.permute(2, 0, 1), self.rows.flatten(2).transpose(0, 1))
        weighted = weighted.view(n, k, t, out).transpose(1, 2).flatten(0, 1)  # [N·T, k, out]
        sums = {}
        if self.weight is not None:
            total = weighted.flatten(1).mT @ self._own_inputs().flatten(0, 1)
            sums[self.weight] = total.reshape(k, *self.weight_shape)
        if self.bias is not None:
            sums[self.bias] = weighted.sum(0)
        return sums

    @override
    def examples(self, some: slice) -> Self:
        if self.owners is None:
            return replace(self, rows=self.rows[:, some], inputs=self.inputs[some])
        needed, owners = self.owners[some].unique(return_inverse=True)
        return replace(self, rows=self.rows[:, some], inputs=self.inputs[needed], owners=owners)

    @override
    def select(self, columns: Tensor, examples: Tensor) -> Self:
        owning = examples if self.owners is None else self.owners[examples]
        needed, owners = owning.unique(return_inverse=True)
        rows = self.rows[columns, examples].unsqueeze(0)
        return replace(self, rows=rows, inputs=self.inputs[needed], owners=owners)

    def merge(self, others: Sequence[Self], dim: int) -> Self:
        """Join these rows and others. Shorter examples get positions whose gradient and input are zero."""
        every = [self, *others]
        if dim == 0:
            return replace(self, rows=torch.cat([kept.rows for kept in every]))
        longest = max(kept.rows.shape[2] for kept in every)
        rows, inputs = zip(*(kept._padded(longest) for kept in every), strict=True)
        owners = None
        if any(kept.owners is not None for kept in every):
            starts = itertools.accumulate((len(kept.inputs) for kept in every), initial=0)
            owners = torch.cat([kept._owners() + start for kept, start in zip(every, starts, strict=False)])
        return replace(self, rows=torch.cat(rows, dim=1), inputs=torch.cat(inputs), owners=owners)

    def _owners(self) -> Tensor:
        """[N] into `inputs`, also where they are the examples themselves."""
        if self.owners is not None:
            return self.owners
        return torch.arange(self.rows.shape[1], device=self.rows.device)

    def _padded(self, positions: int) -> tuple[Tensor, Tensor]:
        if positions == self.rows.shape[2]:
            return self.rows, self.inputs
        missing = (0, 0, 0, positions - self.rows.shape[2])
        return F.pad(self.rows, missing), F.pad(self.inputs, missing)

    @override
    def blank(self, num_examples: int) -> Self:
        rows = self.rows.new_zeros(len(self.rows), num_examples, *self.rows.shape[2:])
        inputs = self.inputs.new_zeros(num_examples, *self.inputs.shape[1:])
        return replace(self, rows=rows, inputs=inputs, owners=None)

    @override
    def to(self, dtype: torch.dtype) -> Self:
        return replace(self, rows=self.rows.to(dtype), inputs=self.inputs.to(dtype))


def _picked(factor: Tensor, owners: Tensor | None, positions: int, dim: int) -> Tensor:
    """Entries of the examples that own the rows: [n·T, ...] -> [N·T, ...] along `dim`."""
    if owners is None:
        return factor
    if positions > 1:
        offsets = torch.arange(positions, device=owners.device)
        owners = (owners.unsqueeze(1) * positions + offsets).flatten()
    return factor.index_select(dim, owners)


def _sum(shares: Iterator[Tensor]) -> Tensor:
    total = next(shares)
    for share in shares:
        total = total + share
    return total

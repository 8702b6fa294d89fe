"""The rows of the square root of the generalized Gauss-Newton matrix: G = VᵀV.

With R[c, n] column c of a square root of the Hessian of the loss in output n, and Jₙ the Jacobian of that
output, row (n, c) of V is v₍ₙ,c₎ = JₙᵀR[c, n] ∈ ℝᵖ. One backward pass of Σₙ ⟨f(xₙ), R[c, n]⟩ gives row c of
every example at once: autograd takes it to the *output of each layer*, through whatever graph lies between,
and the derivatives of that one layer take it from there to per-example gradients: those of `derivatives`, or
torch.func's.

This module knows the layers; `reader` runs the passes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bayes.rows.layers import CONVOLUTIONS
from lightning_bayes.rows.uses import CHUNK, LayerUse, Use


@dataclass(frozen=True)
class OuterRows:
    """Rows of a linear map at T positions of each example: v₍ₙ,c₎ = (Σₜ g₍ₙ,c,t₎ aₙₜᵀ, Σₜ g₍ₙ,c,t₎).

    Kept as their factors: the p-long rows of the weight are formed only where somebody asks for them. The
    positions of a weight that is used more than once are those of all its uses.
    """

    weight: str | None
    bias: str | None
    uses: tuple[LayerUse, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters in the order of `dense`."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def weight_shape(self) -> torch.Size:
        """The weight's own shape: a convolution's is [out, in, *kernel]."""
        weight: Tensor = self.uses[0].module.weight  # type: ignore[assignment]
        return weight.shape

    def inputs(self) -> Tensor:
        """The a: [N, T, in]."""
        return _joined([use.linear_inputs() for use in self.uses], 1)

    def grads(self) -> Tensor:
        """The g: [C, N, T, out]."""
        return _joined([use.linear_grads() for use in self.uses], 2)

    def combined(self, weights: Mapping[int, float]) -> "OuterRows":
        """One row wₙ Σ_c v₍ₙ,c₎ for each of some examples."""
        return replace(self, uses=tuple(use.combined(weights) for use in self.uses))

    def total(self, names: Collection[str]) -> dict[str, Tensor]:
        """Σ over rows of v [p], of some of the parameters."""
        grads, sums = self.grads().sum(0).flatten(0, 1), {}
        if self.weight is not None and self.weight in names:
            sums[self.weight] = (grads.mT @ self.inputs().flatten(0, 1)).flatten()
        if self.bias is not None and self.bias in names:
            sums[self.bias] = grads.sum(0)
        return sums

    def projected(
        self, weights: Tensor, directions: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """⟨u vᵀ, Σₙ wₙ v₍ₙ,₀₎⟩ over the rows of the first column: Σₙₜ wₙ (g₍ₙₜ₎·u)(a₍ₙₜ₎·v), no matrix formed.

        Args:
            weights: wₙ, [N].
            directions: u [out] and v [in] for each parameter; a bias has v = 1.
        """
        sums: dict[str, Tensor] = {}
        for use in self.uses:
            for name in self.names:
                left, right = directions[name]
                along = _along(use, left).view(len(weights), -1)
                along = (
                    along.sum(1)
                    if name == self.bias
                    else (along * _inputs_along(use, right).view_as(along)).sum(1)
                )
                part = weights.to(along).dot(along)
                sums[name] = sums[name] + part if name in sums else part
        return sums

    def dense(self) -> dict[str, Tensor]:
        """Rows [C, N, p] of each parameter."""
        grads, rows = self.grads(), {}
        if self.weight is not None:
            rows[self.weight] = (grads.mT @ self.inputs()).flatten(2)
        if self.bias is not None:
            rows[self.bias] = grads.sum(2)
        return rows

    def sum_squares(self) -> dict[str, Tensor]:
        """Σ over rows of v², in the parameters' shapes."""
        grads, sums = self.grads(), {}
        if grads.shape[2] == 1:
            squares = torch.zeros_like(grads[0, :, 0])
            for column in grads.squeeze(2):
                squares.addcmul_(column, column)  # without a second tensor of their size
            if self.weight is not None:
                weight = squares.mT @ self.inputs().squeeze(1).square()
                sums[self.weight] = weight.reshape(self.weight_shape)
            if self.bias is not None:
                sums[self.bias] = squares.sum(0)
            return sums
        if self.weight is not None:
            sums[self.weight] = self._weight_squares(self.inputs(), grads).reshape(self.weight_shape)
        if self.bias is not None:
            sums[self.bias] = grads.sum(2).square().sum((0, 1))
        return sums

    @staticmethod
    def _weight_squares(inputs: Tensor, grads: Tensor) -> Tensor:
        """Σ (Σₜ gₜ aₜᵀ)², as Σ over pairs of positions of (gₜ ∘ gₛ)(aₜ ∘ aₛ)ᵀ while that is less work."""
        positions = inputs.shape[1]
        total = inputs.new_zeros(grads.shape[3], inputs.shape[2])
        if positions < 2 * len(grads):
            left, right = torch.triu_indices(positions, positions, device=inputs.device)
            twice = torch.where(left == right, 1.0, 2.0).to(inputs).unsqueeze(1)
            step = max(1, CHUNK // (len(left) * max(grads.shape[3] * len(grads), inputs.shape[2])))
            for start in range(0, len(inputs), step):
                some = slice(start, start + step)
                g = (grads[:, some, left] * grads[:, some, right]).sum(0) * twice
                a = inputs[some, left] * inputs[some, right]
                total.addmm_(g.flatten(0, 1).mT, a.flatten(0, 1))
            return total
        step = max(1, CHUNK // total.numel())
        for column in grads:
            for start in range(0, len(inputs), step):
                some = slice(start, start + step)
                total += torch.bmm(column[some].mT, inputs[some]).square_().sum(0)
        return total


@dataclass(frozen=True)
class DenseRows:
    """Rows of one parameter of any other kind, as per-example gradients summed over the parameter's uses."""

    name: str
    shape: torch.Size
    uses: tuple[tuple[str, Use], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameter's name, as a tuple of one."""
        return (self.name,)

    def combined(self, weights: Mapping[int, float]) -> "DenseRows":
        """One row wₙ Σ_c v₍ₙ,c₎ for each of some examples."""
        return replace(self, uses=tuple((name, use.combined(weights)) for name, use in self.uses))

    def total(self, names: Collection[str]) -> dict[str, Tensor]:
        """Σ over rows of v [p], if the parameter is among some."""
        return {self.name: self.dense()[self.name].sum((0, 1))} if self.name in names else {}

    @property
    def kept_when_formed(self) -> bool:
        """Whether `dense` is kept, so that asking twice costs what asking once does."""
        return all(use.kept_when_formed for _, use in self.uses)

    def weighted_total(self, weights: Tensor) -> dict[str, Tensor]:
        """Σₙ wₙ v₍ₙ,₀₎ over the rows of the first column, flat, for weights [N]."""
        totals = [use.weighted_total(local_name, weights) for local_name, use in self.uses]
        return {self.name: torch.stack(totals).sum(0).flatten()}

    def dense(self) -> dict[str, Tensor]:
        """Rows [C, N, p]."""
        rows = self._columns(slice(None))
        return {self.name: rows.reshape(*rows.shape[:2], -1)}  # a scalar's too

    def columns(self) -> Iterator[Tensor]:
        """Rows [N, p] of one column after the other: C times less memory than `dense`."""
        for column in range(self.uses[0][1].num_columns):
            rows = self._columns(slice(column, column + 1))
            yield rows.reshape(rows.shape[1], -1)

    def sum_squares(self) -> dict[str, Tensor]:
        """Σ over rows of v², in the parameter's shape."""
        if len(self.uses) == 1:
            local_name, use = self.uses[0]
            return {self.name: use.sum_squares(local_name)}
        squares = torch.stack([rows.square().sum(0) for rows in self.columns()]).sum(0)
        return {self.name: squares.reshape(self.shape)}

    def _columns(self, columns: slice) -> Tensor:
        total = self.uses[0][1].rows(self.uses[0][0], columns)
        for local_name, use in self.uses[1:]:
            total = total + use.rows(local_name, columns)
        return total


Rows = OuterRows | DenseRows


@dataclass(frozen=True)
class RowBlock:
    """Rows of one batch of examples, for some columns of the root.

    A batch of many columns comes in several blocks, one after the other; the first of them has
    `columns.start == 0`. Every block of a batch has the same `layers` in the same order.
    """

    num_examples: int
    columns: slice
    num_columns: int
    """Of the whole root, or the number of samples where columns are sampled."""
    layers: list[Rows]


_CONVOLUTION = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def _along(use: LayerUse, left: Tensor) -> Tensor:
    """g·u at each position of the first column's gradients in what a linear layer makes."""
    grads = use.grads[0]
    return left @ grads.flatten(2) if isinstance(use.module, CONVOLUTIONS) else grads @ left


def _inputs_along(use: LayerUse, right: Tensor) -> Tensor:
    """a·v at each position of what a linear layer sees: what it would make with the one channel v."""
    module: Any = use.module
    for layer, convolution in _CONVOLUTION.items():
        if isinstance(module, layer):
            kernel = right.view(1, *module.weight.shape[1:])
            made = convolution(use.inputs, kernel, None, module.stride, module.padding, module.dilation)
            return made
    return use.inputs @ right


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)

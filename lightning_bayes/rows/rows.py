"""The rows of the square root of the generalized Gauss-Newton matrix: G = VᵀV.

With R[c, n] column c of a square root of the Hessian of the loss in output n, and Jₙ the Jacobian of that
output, row (n, c) of V is v₍ₙ,c₎ = JₙᵀR[c, n] ∈ ℝᵖ. One backward pass of Σₙ ⟨f(xₙ), R[c, n]⟩ gives row c of every
example: autograd takes it to the *output of each layer*, and the layer's derivatives from there to its parameters.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from backpack.utils.conv import unfold_input
from torch import Tensor, nn
from typing_extensions import override

from lightning_bayes.rows.backward import one_column
from lightning_bayes.rows.layers import CONVOLUTIONS, Derivatives, outer_squares
from lightning_bayes.rows.uses import Use


@dataclass(frozen=True, eq=False)
class LayerUse(Use):
    """One call of a layer whose derivatives are known.

    An example may take several consecutive entries of the first dimension: windows of an image, or the
    tokens of a sequence that was flattened into the batch.
    """

    module: nn.Module
    derivatives: Derivatives
    inputs: Tensor  # [N·k, ...]
    output: Tensor  # [N·k, ...], as the layer made it
    grads: Tensor  # [C, N·k, ...]: column c's gradient in the output
    entries: int = 1  # k

    @property
    @override
    def num_columns(self) -> int:
        return len(self.grads)

    @override
    def rows(self, local_name: str, columns: slice) -> Tensor:
        grads = self.grads[columns]
        rows = self.derivatives.rows(self.module, local_name, self.inputs, self.output, grads)
        if self.entries == 1:
            return rows
        grouped: Tensor = rows.unflatten(1, (-1, self.entries))
        return grouped.sum(2)

    @override
    def example(self, index: int) -> "LayerUse":
        its = slice(index * self.entries, (index + 1) * self.entries)
        return replace(self, inputs=self.inputs[its], output=self.output[its], grads=self.grads[:, its])

    @override
    def one_column(self, columns: Tensor) -> "LayerUse":
        return replace(self, grads=one_column(columns, self.grads))

    @override
    def weighted_total(self, local_name: str, weights: Tensor) -> Tensor:
        along = weights.to(self.grads)
        if self.entries > 1:
            along = along.repeat_interleave(self.entries)
        grads = self.grads[:1] * along.reshape(-1, *[1] * (self.grads.dim() - 2))
        # Without forming rows where the derivatives can do without.
        total_of: Callable[..., Tensor] | None = getattr(self.derivatives, "total", None)
        if total_of is not None:
            return total_of(self.module, local_name, self.inputs, self.output, grads)
        return self.derivatives.rows(self.module, local_name, self.inputs, self.output, grads).sum((0, 1))

    @property
    def is_linear(self) -> bool:
        """Whether the layer is one linear map, applied at each of T positions of an example."""
        if isinstance(self.module, nn.Linear):
            return True
        return isinstance(self.module, CONVOLUTIONS) and self.module.groups == 1

    @override
    def sum_squares(self, local_name: str) -> Tensor:
        sparse = getattr(self.derivatives, "sum_squares", None)
        if sparse is None or self.entries != 1:
            return super().sum_squares(local_name)
        squares: Tensor = sparse(self.module, self.inputs, self.grads)
        return squares

    def linear_inputs(self) -> Tensor:
        """What the linear map sees: [N, T, in]."""
        if isinstance(self.module, CONVOLUTIONS):
            inputs: Tensor = unfold_input(self.module, self.inputs).mT
            return inputs.reshape(-1, self.entries * inputs.shape[1], inputs.shape[2])
        return self.inputs.reshape(len(self.inputs) // self.entries, -1, self.inputs.shape[-1])

    def linear_grads(self) -> Tensor:
        """Gradients in what the linear map makes: [C, N, T, out]."""
        grads = self.grads
        if isinstance(self.module, CONVOLUTIONS):
            grads = grads.flatten(3).mT
        return grads.reshape(len(grads), grads.shape[1] // self.entries, -1, grads.shape[-1])


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

    def with_uses(self, change: Callable[[Any], Any]) -> "OuterRows":
        """The rows of other uses, one in the place of each."""
        return replace(self, uses=tuple(map(change, self.uses)))

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
            sums[self.weight] = outer_squares(self.inputs(), grads).reshape(self.weight_shape)
        if self.bias is not None:
            sums[self.bias] = grads.sum(2).square().sum((0, 1))
        return sums


@dataclass(frozen=True)
class DenseRows:
    """Rows of one parameter of any other kind, as per-example gradients summed over the parameter's uses."""

    name: str
    shape: torch.Size
    uses: tuple[tuple[str, Use], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The one parameter."""
        return (self.name,)

    def with_uses(self, change: Callable[[Any], Any]) -> "DenseRows":
        """The rows of other uses, one in the place of each."""
        return replace(self, uses=tuple((local_name, change(use)) for local_name, use in self.uses))

    @property
    def kept_when_formed(self) -> bool:
        """Whether `dense` is kept, so that asking twice costs what asking once does."""
        return all(use.kept_when_formed for _, use in self.uses)

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
class RowChunk:
    """Rows of one batch of examples, for some columns of the root.

    A batch of many columns comes in several chunks, one after the other; the first of them has
    `columns.start == 0`. Every chunk of a batch has the same `layers` in the same order.
    """

    num_examples: int
    columns: slice
    num_columns: int
    """Columns of the whole root, or the number of samples where columns are sampled."""
    layers: list[Rows]


def joined(made: list[tuple[dict[str, str], Use]], parameters: Mapping[str, nn.Parameter]) -> list[Rows]:
    """Rows by the uses of parameters {local name: name}: of weight and bias together if always used together."""
    uses: dict[str, list[tuple[str, Use]]] = defaultdict(list)
    for names, use in made:
        for local_name, name in names.items():
            uses[name].append((local_name, use))
    linear: dict[tuple[LayerUse, ...], dict[str, str]] = defaultdict(dict)
    dense: list[Rows] = []
    for name, its in uses.items():
        maps = tuple(use for _, use in its if isinstance(use, LayerUse) and use.is_linear)
        local_names = {local_name for local_name, _ in its}
        if len(maps) == len(its) and len(local_names) == 1:
            linear[maps][local_names.pop()] = name
        else:
            dense.append(DenseRows(name, parameters[name].shape, tuple(its)))
    outer = [OuterRows(held.get("weight"), held.get("bias"), maps) for maps, held in linear.items()]
    return [*outer, *dense]


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)

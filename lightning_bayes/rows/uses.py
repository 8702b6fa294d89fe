"""One call of one module: what it adds to the rows of its parameters."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_bayes.rows.backward import one_column
from lightning_bayes.rows.layers import CONVOLUTIONS, Derivatives, unfold_input

CHUNK = 2**24
"""Numbers that a temporary of per-example gradients may hold where it can be made in pieces."""


class Use(ABC):
    """One call of one module: its parameters' contribution to the rows of one batch."""

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """C, columns of the root whose gradients are here."""

    @property
    def kept_when_formed(self) -> bool:
        """Whether the rows of all columns are formed in one go and kept."""
        return False

    @abstractmethod
    def rows(self, local_name: str, columns: slice) -> Tensor:
        """Per-example gradients [columns, N, *parameter.shape]."""

    @abstractmethod
    def combined(self, weights: Mapping[int, float]) -> "Use":
        """One row wₙ Σ_c v₍ₙ,c₎ for each of some examples: rows are linear in the gradients of the output."""

    @abstractmethod
    def one_column(self, columns: Tensor) -> "Use":
        """The rows Σ_c ρ_c v₍ₙ,c₎ of every example, as one column, for weights ρ [C] of the columns."""

    @abstractmethod
    def weighted_total(self, local_name: str, weights: Tensor) -> Tensor:
        """Σₙ wₙ v₍ₙ,₀₎ over the rows of the first column, in the parameter's shape, for weights [N]."""

    def sum_squares(self, local_name: str) -> Tensor:
        """Σ over rows of v², in the parameter's shape, one column after the other."""
        columns = (slice(column, column + 1) for column in range(self.num_columns))
        return torch.stack([self.rows(local_name, some).square().sum((0, 1)) for some in columns]).sum(0)


@dataclass(frozen=True)
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
    def combined(self, weights: Mapping[int, float]) -> "LayerUse":
        its = [example * self.entries + entry for example in weights for entry in range(self.entries)]
        grads = self.grads[:, its].sum(0, keepdim=True)
        scale = grads.new_tensor(list(weights.values())).repeat_interleave(self.entries)
        grads = grads * scale.reshape(-1, *[1] * (grads.dim() - 2))
        return replace(self, inputs=self.inputs[its], output=self.output[its], grads=grads)

    @override
    def one_column(self, columns: Tensor) -> "LayerUse":
        return replace(self, grads=one_column(columns, self.grads))

    def weighted_total(self, local_name: str, weights: Tensor) -> Tensor:
        """See `Use`; without forming rows where the derivatives can do without."""
        grads = self.weighted_grads(weights).unsqueeze(0)
        total_of = getattr(self.derivatives, "total", None)
        if total_of is not None:
            total: Tensor = total_of(self.module, local_name, self.inputs, self.output, grads)
            return total
        return self.derivatives.rows(self.module, local_name, self.inputs, self.output, grads).sum((0, 1))

    def weighted_grads(self, weights: Tensor) -> Tensor:
        """Gradients of the first column times the weight of the example that they belong to: [N·k, ...]."""
        grads = self.grads[0]
        along = weights.to(grads)
        if self.entries > 1:
            along = along.repeat_interleave(self.entries)
        return grads * along.reshape(-1, *[1] * (grads.dim() - 1))

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

"""One call of one module: what it adds to the rows of its parameters."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.rows.backward import one_column


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
    def example(self, index: int) -> "Use":
        """The rows of one example."""

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


@dataclass(frozen=True, eq=False)
class GraphUse(Use):
    """A parameter's whole way to the outputs, by one backward pass for each row: right for anything, and slow."""

    parameter: Tensor
    outputs: Tensor
    roots: Tensor  # [C, N, ...]
    chosen: range
    """The examples that are asked for."""

    @property
    @override
    def num_columns(self) -> int:
        return len(self.roots)

    @override
    def rows(self, local_name: str, columns: slice) -> Tensor:
        return torch.stack(
            [torch.stack([self._row(root, n) for n in self.chosen]) for root in self.roots[columns]]
        )

    @override
    def example(self, index: int) -> "GraphUse":
        return replace(self, chosen=range(index, index + 1))

    @override
    def one_column(self, columns: Tensor) -> "GraphUse":
        return replace(self, roots=one_column(columns, self.roots))

    @override
    def weighted_total(self, local_name: str, weights: Tensor) -> Tensor:
        return self._pulled_back(
            weights.reshape(-1, *[1] * (self.roots.dim() - 2)).to(self.roots) * self.roots[0]
        )

    def _row(self, root: Tensor, example: int) -> Tensor:
        seed = torch.zeros_like(self.outputs)
        seed[example] = root[example]
        return self._pulled_back(seed)

    def _pulled_back(self, seed: Tensor) -> Tensor:
        (row,) = torch.autograd.grad(
            self.outputs, self.parameter, seed, retain_graph=True, materialize_grads=True
        )
        return row

"""Rows of a stream that are kept: those with the largest keys, in memory that does not grow with the stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bayes.row_storage.stored import KeptRows

Names = tuple[str, ...]


@dataclass(frozen=True)
class RowSet:
    """Single rows of every layer, each with numbers of its own.

    Attributes:
        layers: Of each layer [1, R, ...], by its parameters' names.
        values: [R, k].
    """

    layers: Mapping[Names, KeptRows]
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Tensor) -> "RowSet":
        """Some of the rows, by their numbers."""
        first = torch.zeros_like(rows)
        layers = {names: layer.select(first, rows) for names, layer in self.layers.items()}
        return RowSet(layers, self.values[rows])

    def joined(self, others: Sequence["RowSet"]) -> "RowSet":
        """These rows, then others; a layer that some rows lack has zeros for them."""
        every = [self, *others]
        like = {names: layer for one in reversed(every) for names, layer in one.layers.items()}
        layers = {}
        for names, example in like.items():
            first, *rest = [
                one.layers[names] if names in one.layers else example.examples(slice(0, 0)).blank(len(one))
                for one in every
            ]
            layers[names] = first.merge(rest, 1)
        return RowSet(layers, torch.cat([one.values for one in every]))


class RowReservoir:
    """The rows with the largest keys among those that were offered.

    Args:
        capacity: Rows that are kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pieces: list[RowSet] = []
        self._keys: list[Tensor] = []
        self._number = 0
        self.threshold = -torch.inf
        """No row that was turned away has a key above."""

    def offer(self, rows: RowSet, keys: Tensor) -> list[tuple[RowSet, Tensor]]:
        """Take in rows, and return those that are turned away, these or earlier ones, with their keys."""
        wanted = keys > self.threshold
        away = [(rows.take(index), keys[index]) for index in [(~wanted).nonzero().squeeze(1)] if len(index)]
        index = wanted.nonzero().squeeze(1)
        if len(index):
            self._pieces.append(rows if len(index) == len(rows) else rows.take(index))
            self._keys.append(keys[index])
            self._number += len(index)
        # A quarter more than is kept may wait, so that most batches do not copy what is there.
        if self._number > self._capacity + self._capacity // 4:
            away += self._settle()
        return away

    def close(self) -> list[tuple[RowSet, Tensor]]:
        """Turn away what is still beyond the capacity; after the last rows."""
        return self._settle() if self._number > self._capacity else []

    def rows(self) -> tuple[RowSet, Tensor] | None:
        """What is kept, with its keys; None where nothing was offered."""
        if not self._pieces:
            return None
        whole, keys = self._pieces[0].joined(self._pieces[1:]), torch.cat(self._keys)
        self._pieces, self._keys = [whole], [keys]
        return whole, keys

    def _settle(self) -> list[tuple[RowSet, Tensor]]:
        drawn = self.rows()
        if drawn is None:
            return []
        whole, keys = drawn
        order = keys.argsort(descending=True, stable=True)
        kept, rest = order[: self._capacity].sort().values, order[self._capacity :]
        self.threshold = max(self.threshold, keys[rest].max().item())
        self._pieces, self._keys, self._number = [whole.take(kept)], [keys[kept]], len(kept)
        return [(whole.take(rest), keys[rest])]


class PrioritySample:
    """A random sample of a stream of rows, the heavier the likelier, from which sums over all are estimated.

    Each row of weight w has the priority w/u with u uniform; the k largest are kept, and τ is the largest of the
    others. With w > 0 wherever f is not 0, the sum over the sample of f · max(1, τ/w) is without bias for the sum
    of f over all rows that were offered (Duffield, Lund & Thorup, *Priority Sampling for Estimation of Arbitrary
    Subset Sums*, Journal of the ACM 2007).

    Args:
        size: k.
        seed: Of the random numbers, a stream of their own.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._reservoir = RowReservoir(size)
        self._seed = seed
        self._generator: torch.Generator | None = None

    def offer(self, rows: RowSet, weights: Tensor) -> None:
        """Take in rows with their weights, both of the stream once only."""
        if self._generator is None:
            self._generator = torch.Generator(device=weights.device).manual_seed(self._seed)
        uniform = torch.rand(
            weights.shape, generator=self._generator, dtype=weights.dtype, device=weights.device
        )
        priorities = weights / uniform.clamp(min=torch.finfo(weights.dtype).tiny)
        some = (priorities > self._reservoir.threshold).nonzero().squeeze(1)
        if len(some):
            # The weight travels with the row: it stands in the last of the values.
            chosen = rows.take(some)
            values = torch.cat([chosen.values, weights[some].unsqueeze(1)], 1)
            self._reservoir.offer(RowSet(chosen.layers, values), priorities[some])

    def rows(self) -> tuple[RowSet, Tensor] | None:
        """The sample, and the probability of each row in it given the others, min(1, w/τ); None for no rows."""
        self._reservoir.close()
        drawn = self._reservoir.rows()
        if drawn is None:
            return None
        sample, threshold = drawn[0], self._reservoir.threshold
        weights = sample.values[:, -1]
        likely = torch.ones_like(weights) if threshold <= 0.0 else (weights / threshold).clamp(max=1.0)
        return RowSet(sample.layers, sample.values[:, :-1]), likely

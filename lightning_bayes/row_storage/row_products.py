"""V of a training set and its products with k vectors at once, from rows that are stored, or read again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lightning_bayes.row_storage.collector import RowKeeper
from lightning_bayes.row_storage.newton_decrement import dot_each
from lightning_bayes.row_storage.stored import KeptRows
from lightning_bayes.rows.products import DataPasses
from lightning_bayes.rows.rows import RowChunk

Parameters = dict[str, Tensor]
"""k vectors in the space of parameters: [k, *shape] of each."""


class RowProducts(Protocol):
    """V in batches of N examples with C rows each, the same batches at every call."""

    def batches(self) -> Iterator[Sequence[KeptRows]]:
        """Yield the rows of one batch after the other, every layer of it."""

    def combine(self, coefficients: Sequence[Tensor]) -> Parameters:
        """Vᵀ times coefficients [k, C, N] of each batch."""

    def dot(self, vectors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """V times vectors [k, *shape] of each parameter: [k, C, N] of each batch."""


class StoredRows:
    """Products from rows in memory; batches stay apart, so that nothing of the size of all rows is put together."""

    def __init__(self) -> None:
        self._batches: list[Sequence[KeptRows]] = []

    def add(self, layers: Sequence[KeptRows]) -> None:
        """Store one batch."""
        self._batches.append(layers)

    def batches(self) -> Iterator[Sequence[KeptRows]]:
        """Yield the rows of one batch after the other."""
        yield from self._batches

    def combine(self, coefficients: Sequence[Tensor]) -> Parameters:
        """Vᵀ times coefficients [k, C, N] of each batch."""
        total: Parameters = {}
        for layers, own in zip(self._batches, coefficients, strict=True):
            for layer in layers:
                for name, share in layer.combine(own).items():
                    if name in total:
                        total[name] += share
                    else:
                        total[name] = share
        return total

    def dot(self, vectors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """V times vectors [k, *shape] of each parameter: [k, C, N] of each batch."""
        for layers in self._batches:
            yield dot_each(layers, vectors)


class RereadRows:
    """Products by passes over the data, in the memory of one batch."""

    def __init__(self, passes: DataPasses) -> None:
        self.combine, self.dot = passes.combine, passes.dot
        self._chunks = passes.chunks

    def batches(self) -> Iterator[Sequence[KeptRows]]:
        """Yield the rows of one batch after the other."""
        collector = BatchCollector()
        for chunk in self._chunks():
            layers = collector.add(chunk)
            if layers is not None:
                yield layers


class BatchCollector:
    """Puts the chunks of one batch after the other together."""

    def __init__(self) -> None:
        self._keeper = RowKeeper()

    def add(self, chunk: RowChunk) -> Sequence[KeptRows] | None:
        """Return all layers [C, N, ...] of a batch once its last chunk is in."""
        self._keeper.add(chunk)
        if chunk.columns.stop < chunk.num_columns:
            return None
        layers = [layer.widen(chunk.num_columns) for layer in self._keeper.layers()]
        self._keeper = RowKeeper(self._keeper)  # later batches keep to its forms
        return layers

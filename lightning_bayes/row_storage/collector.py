"""All layers of the kept rows together: the forms that they are kept in, tiles of K = V Λ⁻¹ Vᵀ, principal rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bayes.row_storage.factored import KeptOuter
from lightning_bayes.row_storage.stored import KeptDense, KeptRows
from lightning_bayes.rows.rows import OuterRows, RowChunk, Rows

PAIR_OVERHEAD = 16
"""Multiplications that one product of two position-wise inner products counts as: it is bound by memory."""

Form = tuple[bool, bool]
"""How a linear map's rows are stored: whether products go by pairs of positions, and whether factors are kept."""


class RowKeeper:
    """Collects the blocks of a pass: columns of one batch side by side, then batch after batch.

    Args:
        before: A keeper of earlier batches, whose forms this one keeps to.
    """

    def __init__(self, before: "RowKeeper | None" = None) -> None:
        self._sizes: list[int] = []  # examples of each batch
        self._idle: list[KeptRows] = []  # of a batch whose rows are all zero
        self._columns = 0  # of the batch that has most: those of tokens are as many as its sequences are long
        self._chunks: dict[tuple[str, ...], dict[int, list[KeptRows]]] = {}
        self._forms: dict[tuple[str, ...], Form] = {} if before is None else before._forms

    def add(self, chunk: RowChunk) -> None:
        """Take in one chunk.

        Raises:
            ValueError: If a parameter comes in another form than before: products with its earlier rows would
                be missed.
        """
        if chunk.columns.start == 0:
            self._sizes.append(chunk.num_examples)
            self._columns = max(self._columns, chunk.num_columns)
        layers = [kept for layer in chunk.layers for kept in keep(layer, chunk.num_columns, self._forms)]
        if not any(_is_seen(layer.rows) for layer in layers):  # saturated or ignored: as if it were not there
            self._idle = layers
            return
        for layer in layers:
            if any(set(names) & set(layer.names) and names != layer.names for names in self._chunks):
                raise ValueError(
                    f"The network uses {sorted(layer.names)} in different layers for different batches; the exact "
                    'evidence needs the same for all. Use structure="kron" or structure="diag".'
                )
            batches = self._chunks.setdefault(layer.names, {})
            batches.setdefault(len(self._sizes) - 1, []).append(layer)

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        counts = (
            sum(chunk.num_rows for chunks in batches.values() for chunk in chunks)
            for batches in self._chunks.values()
        )
        return max(counts, default=0)

    def layers(self) -> list[KeptRows]:
        """One entry a layer, over all examples, with the columns of the batch that has most.

        A batch that did not use the layer, or has fewer columns, has rows of zeros there.

        Raises:
            ValueError: If nothing was kept.
        """
        if not self._chunks and self._idle:
            return [layer.blank(sum(self._sizes)) for layer in self._idle]
        if not self._chunks:
            raise ValueError("No parameter that carries a prior has an influence on the network's outputs.")
        whole = []
        for batches in self._chunks.values():
            of_batches = {index: _merged(chunks, 0).widen(self._columns) for index, chunks in batches.items()}
            batches.clear()  # each layer's pieces go before the next layer is put together
            like = next(iter(of_batches.values()))
            every = [
                of_batches[index] if index in of_batches else like.blank(size)
                for index, size in enumerate(self._sizes)
            ]
            whole.append(_merged(every, 1))
            batches[0] = [whole[-1]]
        self._sizes = [sum(self._sizes)]
        return whole


def _is_seen(rows: Tensor) -> bool:
    """Whether some entry is not zero; one example's tell, as a rule, without a look at all of them."""
    return bool(rows[:, :1].any()) or bool(rows.any())


def _merged(pieces: Sequence[KeptRows], dim: int) -> KeptRows:
    return pieces[0] if len(pieces) == 1 else pieces[0].merge(pieces[1:], dim)


def keep(layer: Rows, num_columns: int, forms: dict[tuple[str, ...], Form]) -> list[KeptRows]:
    """Keep a layer's rows beyond their batch: factored where that takes fewer operations or less memory.

    Args:
        layer: Rows of some columns of a batch.
        num_columns: C of the whole root, which decides.
        forms: Of the layers seen before, by their names: later batches, of other lengths, keep to the first's.
    """
    if not isinstance(layer, OuterRows):
        return [KeptDense(rows, name, layer.shape) for name, rows in layer.dense().items()]
    if layer.names not in forms:
        forms[layer.names] = _plan(layer, num_columns)[:2]
    paired, factored = forms[layer.names]
    if factored:
        # Not the views that a convolution's factors come as: every product would copy them.
        inputs, grads = layer.inputs().contiguous(), layer.grads().contiguous()
        return [KeptOuter(grads, inputs, layer.weight, layer.bias, layer.weight_shape, paired)]
    shapes = {layer.weight: layer.weight_shape, layer.bias: layer.weight_shape[:1]}
    return [KeptDense(rows, name, shapes[name]) for name, rows in layer.dense().items()]


def kept_widths(chunk: RowChunk) -> tuple[int, int, int]:
    """Numbers that a row is kept as, multiplications of an inner product of two rows, and of one example's forward.

    The first two are rounded up, the last are those of the linear maps.
    """
    kept, product, forward = 0, 0, 0
    for layer in chunk.layers:
        if isinstance(layer, OuterRows):
            _, _, numbers, operations = _plan(layer, chunk.num_columns)
            inputs, grads = layer.inputs(), layer.grads()
            maps = inputs.shape[1] * inputs.shape[2] * grads.shape[3]
            kept, product, forward = kept + numbers, product + operations, forward + maps
        else:
            size = layer.shape.numel()
            kept, product, forward = kept + size, product + size, forward + size
    return kept, product, forward


def _plan(layer: OuterRows, columns: int) -> tuple[bool, bool, int, int]:
    """Whether to pair positions, whether to keep factors, numbers of a row, operations of a pair of rows."""
    t, out = layer.grads().shape[2:]
    width = layer.inputs().shape[2]
    length = out * (width * (layer.weight is not None) + (layer.bias is not None))
    by_pairs = t**2 * (out + -(-width // columns**2)) + (t**2 * PAIR_OVERHEAD if t > 1 else 0)
    factors = t * (out + -(-width // columns))
    paired = t == 1 or by_pairs < length
    if paired:
        return True, True, factors, by_pairs
    return False, factors < length, min(factors, length), length


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
    columns = len(layers[0].rows)
    ranges = [slice(tile.start * columns, tile.stop * columns) for tile in tiles]
    first = True
    for layer in layers:
        for part in layer.parts(layer.num_rows):
            pieces = [part.examples(tile) for tile in tiles]
            for i, left in enumerate(pieces):
                for j in range(i, len(pieces)):
                    target = buffer[ranges[i], ranges[j]]
                    share = left.cross(pieces[j], precision)
                    target.copy_(share) if first else target.add_(share)
            first = False


def cross_all(left: Sequence[KeptRows], right: Sequence[KeptRows], precision: Mapping[str, float]) -> Tensor:
    """K between two sets of rows, [C·N, C'·N']."""
    total = left[0].cross(right[0], precision)
    for one, other in zip(left[1:], right[1:], strict=True):
        total += one.cross(other, precision)
    return total


def example_grams(layers: Sequence[KeptRows], precision: Mapping[str, float]) -> Tensor:
    """K between the rows of each single example, [N, C, C]."""
    return torch.stack([layer.example_grams(precision) for layer in layers]).sum(0)


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

"""In which form a layer's rows are kept: as factors where that takes fewer operations or less memory."""

from lightning_bayes.row_storage.factored import KeptOuter
from lightning_bayes.row_storage.stored import KeptDense, KeptRows
from lightning_bayes.rows.rows import OuterRows, RowBlock, Rows

PAIR_OVERHEAD = 16
"""Multiplications that one product of two position-wise inner products counts as: it is bound by memory."""

Form = tuple[bool, bool]
"""Of a linear map's rows: whether inner products go by pairs of positions, and whether factors are kept."""


def keep(layer: Rows, num_columns: int, forms: dict[tuple[str, ...], Form]) -> list[KeptRows]:
    """Keep a layer's rows beyond their batch: factored where that takes fewer operations or less memory.

    Args:
        layer: Rows of some columns of a batch.
        num_columns: C of the whole root, which decides.
        forms: Of the layers seen before, by their names: later batches, of other lengths, keep to the first's.
    """
    if not isinstance(layer, OuterRows):
        return [KeptDense(rows, name, layer.shape) for name, rows in layer.dense().items()]
    # Not the views that a convolution's factors come as: every product would copy them.
    inputs, grads = layer.inputs().contiguous(), layer.grads().contiguous()
    plan = _plan(layer, grads.shape[2], grads.shape[3], inputs.shape[2], num_columns)
    paired, factored = forms.setdefault(layer.names, plan[:2])
    if factored:
        return [KeptOuter(grads, inputs, layer.weight, layer.bias, layer.weight_shape, paired)]
    shapes = {layer.weight: layer.weight_shape, layer.bias: layer.weight_shape[:1]}
    return [KeptDense(rows, name, shapes[name]) for name, rows in layer.dense().items()]


def keep_block(block: RowBlock, forms: dict[tuple[str, ...], Form]) -> list[KeptRows]:
    """All layers of a block, kept; see `keep`."""
    return [kept for layer in block.layers for kept in keep(layer, block.num_columns, forms)]


def kept_widths(block: RowBlock) -> tuple[int, int]:
    """Numbers that a row is kept as, and multiplications of an inner product of two rows; both rounded up."""
    kept, product = 0, 0
    for layer in block.layers:
        if isinstance(layer, OuterRows):
            positions, out = layer.grads().shape[2:]
            width = layer.inputs().shape[2]
            _, _, numbers, operations = _plan(layer, positions, out, width, block.num_columns)
            kept, product = kept + numbers, product + operations
        else:
            kept, product = kept + layer.shape.numel(), product + layer.shape.numel()
    return kept, product


def _plan(layer: OuterRows, t: int, out: int, width: int, columns: int) -> tuple[bool, bool, int, int]:
    """Whether to pair positions, whether to keep factors, numbers of a row, operations of a pair of rows."""
    length = out * (width * (layer.weight is not None) + (layer.bias is not None))
    by_pairs = t**2 * (out + -(-width // columns**2)) + (t**2 * PAIR_OVERHEAD if t > 1 else 0)
    factors = t * (out + -(-width // columns))
    paired = t == 1 or by_pairs < length
    if paired:
        return True, True, factors, by_pairs
    return False, factors < length, min(factors, length), length

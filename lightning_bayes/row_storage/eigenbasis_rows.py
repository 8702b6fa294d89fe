"""The rows of many batches, each example's turned to the eigenbasis of its own block of K, and products with K.

Batches stay apart, so that nothing of the size of all rows is put together, and what is turned is the coefficients
of the rows rather than the rows: with U the eigenvectors of an example's block, U (w) goes in and Uᵀ comes out.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.row_storage.collector import example_grams
from lightning_bayes.row_storage.largest_rows import RowSet
from lightning_bayes.row_storage.newton_decrement import combine_all, dot_all
from lightning_bayes.row_storage.stored import KeptRows

Parameters = dict[str, Tensor]
"""One number for each entry of each parameter."""


class EigenbasisRows:
    """V of all batches at one prior; rows are numbered batch by batch, i·N + n within one of N examples.

    Args:
        batches: The layers of each batch, [C, N, ...].
        precision: λ of each parameter tensor.
    """

    def __init__(self, batches: Sequence[Sequence[KeptRows]], precision: Mapping[str, float]) -> None:
        self._batches = batches
        self._precision = precision
        self._rotations: list[Tensor] = []  # U [N, C, C] of each batch
        diagonals = []
        for layers in batches:
            grams = example_grams(layers, precision)
            values, vectors = torch.linalg.eigh(grams.to(accumulation_dtype(grams.device)))
            self._rotations.append(vectors.to(grams))
            diagonals.append(values.clamp_(min=0.0).mT.flatten())
        self.diagonal = torch.cat(diagonals)
        """K_ii of every row."""
        self._sizes = [len(part) for part in diagonals]

    def combine(self, coefficients: Tensor) -> Parameters:
        """Vᵀ times coefficients [rows]."""
        total: Parameters = {}
        for layers, rotations, part in self._parts(coefficients):
            turned = torch.einsum("ncd,dn->cn", rotations, part.view(-1, len(rotations)))
            for name, share in combine_all(layers, turned):
                total[name] = total[name] + share if name in total else share
        return total

    def dot(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """V times a vector: [rows]."""
        return torch.cat(
            [
                torch.einsum("ncd,cn->dn", rotations, dot_all(layers, vectors)).flatten()
                for layers, rotations in zip(self._batches, self._rotations, strict=True)
            ]
        )

    def select(self, numbers: Tensor) -> list[KeptRows]:
        """Some rows, by their ascending numbers, as [1, R]; a layer that a batch lacks has zeros for its rows."""
        pieces, start = [], 0
        for layers, rotations, size in zip(self._batches, self._rotations, self._sizes, strict=True):
            own = numbers[(numbers >= start) & (numbers < start + size)] - start
            start += size
            if len(own) == 0:
                continue
            columns, examples = own // len(rotations), own % len(rotations)
            single = {layer.names: layer.rotate(rotations).select(columns, examples) for layer in layers}
            pieces.append(RowSet(single, self.diagonal.new_zeros(len(own), 0)))
        return list(pieces[0].joined(pieces[1:]).layers.values())

    def cross(self, rows: Sequence[KeptRows]) -> Iterator[Tensor]:
        """K between some rows [1, R] and those of one batch after the other: [R, rows of the batch]."""
        for layers, rotations in zip(self._batches, self._rotations, strict=True):
            shared = {layer.names: layer for layer in layers}
            total = torch.zeros(rows[0].num_rows, layers[0].num_rows).to(rotations)
            for layer in rows:
                if layer.names in shared:
                    total += layer.cross(shared[layer.names], self._precision)
            apart = total.view(len(total), -1, len(rotations))
            yield torch.einsum("ncd,rcn->rdn", rotations, apart).flatten(1)

    def _parts(self, coefficients: Tensor) -> Iterator[tuple[Sequence[KeptRows], Tensor, Tensor]]:
        return zip(self._batches, self._rotations, coefficients.split(self._sizes), strict=True)

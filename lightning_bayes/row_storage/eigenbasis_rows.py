"""All rows of a training set, each example's turned to the eigenbasis of its own block of K, and products with them.

What is turned is the coefficients of the rows rather than the rows: with U the eigenvectors of an example's block,
U w goes in and Uᵀ comes out. In that basis random signs have a small part of the variance that they have in others.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.row_storage.collector import example_grams
from lightning_bayes.row_storage.largest_rows import RowReservoir, RowSet
from lightning_bayes.row_storage.row_products import Parameters, RowProducts
from lightning_bayes.row_storage.stored import KeptRows


class EigenbasisRows:
    """V of all batches in one basis for all multiples of a prior; rows are numbered batch by batch, i·N + n within.

    Args:
        precision: λ of each parameter tensor.
        num_selected: Rows with the largest K_ii that are kept by themselves.
    """

    def __init__(self, precision: Mapping[str, float], num_selected: int) -> None:
        self.precision = precision
        self._rotations: list[Tensor] = []  # U [N, C, C] of each batch
        self._diagonals: list[Tensor] = []
        self._largest = RowReservoir(num_selected)
        self._number = 0

    def add(self, layers: Sequence[KeptRows]) -> None:
        """Take in the rows [C, N] of the next batch, of which the rotation and the largest are kept."""
        grams = example_grams(layers, self.precision)
        values, vectors = torch.linalg.eigh(grams.to(accumulation_dtype(grams.device)))
        # The signs of eigenvectors are arbitrary: fixed, the same random signs mean the same from epoch to epoch.
        leading = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        rotations = (vectors * leading.sign()).to(grams)
        diagonal = values.clamp_(min=0.0).mT.flatten()
        wanted = (diagonal > self._largest.threshold).nonzero().squeeze(1)
        if len(wanted):
            columns, examples = wanted // len(grams), wanted % len(grams)
            turned = {layer.names: layer.rotate(rotations).select(columns, examples) for layer in layers}
            numbers = (wanted + self._number).to(diagonal).unsqueeze(1)
            self._largest.offer(RowSet(turned, numbers), diagonal[wanted])
        self._rotations.append(rotations)
        self._diagonals.append(diagonal)
        self._number += len(diagonal)

    def __len__(self) -> int:
        return self._number

    def diagonal(self) -> Tensor:
        """K_ii of every row at `precision`: [rows] in the accurate type."""
        self._diagonals = [torch.cat(self._diagonals)]
        return self._diagonals[0]

    def largest(self) -> tuple[list[KeptRows], Tensor]:
        """The selected rows as [1, S], and their numbers."""
        self._largest.close()
        drawn = self._largest.rows()
        if drawn is None:
            raise ValueError("There are no rows to select from.")
        return list(drawn[0].layers.values()), drawn[0].values[:, 0].long()

    def combine(self, products: RowProducts, coefficients: Tensor) -> Parameters:
        """Vᵀ times coefficients [k, rows]: [k, *shape] of each parameter."""
        return products.combine(
            [
                torch.einsum(
                    "ncd,kdn->kcn", rotations, coefficients[:, own].unflatten(1, (-1, len(rotations)))
                )
                for own, rotations in zip(self._columns(), self._rotations, strict=True)
            ]
        )

    def dot(self, products: RowProducts, vectors: Mapping[str, Tensor]) -> Tensor:
        """V times vectors [k, *shape] of each parameter: [k, rows]."""
        # Into one tensor: small ones between those of a batch would keep the memory of these from being used again.
        like = next(iter(vectors.values()))
        whole = like.new_empty(len(like), len(self))
        for columns, rotations, part in zip(
            self._columns(), self._rotations, products.dot(vectors), strict=True
        ):
            whole[:, columns] = torch.einsum("ncd,kcn->kdn", rotations, part).flatten(1)
        return whole

    def cross(self, products: RowProducts, rows: Sequence[KeptRows]) -> Iterator[tuple[slice, Tensor]]:
        """K at `precision` between some rows [1, R] and those of one batch after the other.

        Returns:
            Where the batch's rows stand, and the matrix [R, rows of the batch].
        """
        of_batches = zip(self._columns(), self._rotations, products.batches(), strict=True)
        for columns, rotations, layers in of_batches:
            shared = {layer.names: layer for layer in layers}
            total = torch.zeros(rows[0].num_rows, layers[0].num_rows).to(rotations)
            for layer in rows:
                if layer.names in shared:
                    total += layer.cross(shared[layer.names], self.precision)
            apart = total.view(len(total), -1, len(rotations))
            yield columns, torch.einsum("ncd,rcn->rdn", rotations, apart).flatten(1)

    def _columns(self) -> Iterator[slice]:
        """Where the rows of one batch after the other stand."""
        start = 0
        for rotations in self._rotations:
            size = len(rotations) * rotations.shape[1]
            yield slice(start, start + size)
            start += size

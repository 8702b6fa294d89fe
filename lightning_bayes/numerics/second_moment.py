"""Second moments Σ v vᵀ of vectors that arrive in batches, and their eigenvectors.

The costly part of a Kronecker factor is its eigendecomposition. Three things keep it small, none of which
changes the answer: vectors fewer than their entries stay vectors; entries that are never anything but zero
(dead units, the margin of an image) are left out; a decomposition is made once for all priors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bayes.numerics.devices import accumulation_dtype

STRIP = 200
"""Rows of the matrix that one product fills: only the part on and above the diagonal is computed."""


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues [r] of a second moment [n, n], all others being 0, with their eigenvectors."""

    values: Tensor
    basis: Tensor  # [active, r], orthonormal columns
    active: Tensor | None  # indices of the entries that are not always 0, None for all

    def coordinates(self, rows: Tensor) -> tuple[Tensor, float]:
        """Rows [m, n] in the eigenvectors' coordinates [m, r], and the squared norm of what these leave out."""
        rows, rest = rows.to(self.basis), 0.0
        if self.active is not None:
            dead = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
            dead[self.active] = False
            rest += rows[:, dead].square().sum().item()
            rows = rows[:, self.active]
        rotated = rows @ self.basis
        if len(self.values) < len(self.basis):
            rest += (rows - rotated @ self.basis.mT).square().sum().item()
        return rotated, rest

    def shares(self, width: int, part: slice) -> Tensor:
        """Squared norm [r] of the part of each eigenvector that lies in some of the n entries."""
        inside = torch.zeros(width, dtype=torch.bool, device=self.basis.device)
        inside[part] = True
        if self.active is not None:
            inside = inside[self.active]
        return self.basis[inside].square().sum(0)


class SecondMoment:
    """Σ v vᵀ: the vectors while they are fewer than their entries, the matrix from then on."""

    def __init__(self) -> None:
        self._vectors: list[Tensor] = []
        self._matrix: Tensor | None = None  # on and above the diagonal
        self._count = 0

    def add(self, vectors: Tensor) -> None:
        """Add the vectors [m, n] of one batch."""
        self._count += len(vectors)
        width = vectors.shape[1]
        if self._matrix is None and self._count < width:
            self._vectors.append(vectors.clone())
            return
        if self._matrix is None:
            self._matrix = vectors.new_zeros(width, width, dtype=accumulation_dtype(vectors.device))
            vectors = torch.cat([*self._vectors, vectors])
            self._vectors = []
        add_products(self._matrix, vectors)

    @classmethod
    def merged(cls, moments: Sequence["SecondMoment"]) -> "SecondMoment":
        """The second moment of the vectors of all."""
        total = cls()
        for moment in moments:
            for vectors in moment._vectors:
                total.add(vectors)
        for moment in moments:
            if moment._matrix is not None:
                total._add_matrix(moment._matrix, moment._count)
        return total

    def _add_matrix(self, matrix: Tensor, count: int) -> None:
        self._count += count
        if self._matrix is not None:
            self._matrix = self._matrix + matrix
            return
        self._matrix = matrix.clone()
        if self._vectors:
            add_products(self._matrix, torch.cat(self._vectors))
            self._vectors = []

    def spectrum(self, dtype: torch.dtype, scale: Tensor | None = None) -> Spectrum:
        """Eigenvalues and eigenvectors.

        Args:
            dtype: Type to decompose in.
            scale: Factors [n] of the entries of every vector, None for 1.
        """
        if self._matrix is not None:
            matrix, active = self._active_matrix(self._matrix, dtype, scale)
            values, basis = torch.linalg.eigh(matrix, UPLO="U")
        else:
            vectors, active = self._active_vectors(dtype, scale)
            if len(vectors) < vectors.shape[1]:
                # Orthonormal to rounding also where eigenvalues are, as those of the small matrix are not.
                basis, triangle = torch.linalg.qr(vectors.mT)
                values, rotation = torch.linalg.eigh(triangle @ triangle.mT)
                basis = basis @ rotation
            else:
                values, basis = torch.linalg.eigh(vectors.mT @ vectors)
        return Spectrum(values.clamp(min=0), basis, active)

    def eigenvalues(self, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """Eigenvalues alone; see `spectrum`."""
        if self._matrix is not None:
            matrix, _ = self._active_matrix(self._matrix, dtype, scale)
        else:
            vectors, _ = self._active_vectors(dtype, scale)
            few = len(vectors) < vectors.shape[1]
            matrix = vectors @ vectors.mT if few else vectors.mT @ vectors
        values: Tensor = torch.linalg.eigvalsh(matrix, UPLO="U")
        return values.clamp(min=0)

    def along(self, spectrum: Spectrum) -> Tensor:
        """uᵀ M u [r] for each eigenvector u of a second moment that this one is a part of."""
        basis, active = spectrum.basis, spectrum.active
        if self._matrix is None:
            if not self._vectors:
                return torch.zeros_like(spectrum.values)
            vectors = torch.cat(self._vectors).to(basis)
            return ((vectors if active is None else vectors[:, active]) @ basis).square().sum(0)
        matrix = self._matrix.to(basis)
        if active is not None:
            matrix = matrix[active][:, active]
        # On and above the diagonal: each entry above counts twice.
        doubled = 2.0 * (matrix.triu() @ basis) - matrix.diagonal().unsqueeze(1) * basis
        return (basis * doubled).sum(0)

    def _active_vectors(self, dtype: torch.dtype, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        vectors = torch.cat(self._vectors).to(dtype)
        if scale is not None:
            vectors = vectors * scale.to(vectors)
        active = _indices((vectors != 0).any(0))
        return (vectors if active is None else vectors[:, active]), active

    @staticmethod
    def _active_matrix(
        matrix: Tensor, dtype: torch.dtype, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        active = _indices(matrix.diagonal() != 0)
        matrix = matrix.to(dtype)
        if active is not None:
            matrix = matrix[active][:, active]
        if scale is not None:
            scale = (scale if active is None else scale[active]).to(matrix)
            matrix = scale.unsqueeze(1) * matrix * scale
        return matrix, active


def _indices(mask: Tensor) -> Tensor | None:
    return None if bool(mask.all()) else mask.nonzero().squeeze(1)


def add_products(matrix: Tensor, vectors: Tensor) -> None:
    """Add Σ v vᵀ of vectors [m, n] to a matrix, on and above the diagonal, in strips."""
    for start in range(0, vectors.shape[1], STRIP):
        strip = slice(start, start + STRIP)
        matrix[strip, start:] += vectors[:, strip].mT @ vectors[:, start:]

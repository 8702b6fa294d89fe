"""I + K factorised, its solves and the trace of K(I + K)⁻¹."""

import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.numerics.cholesky import (
    LARGE_ROUNDING,
    SMALL_ROUNDING,
    cholesky_in_place,
    diagonal_of_inverse,
    keeps_the_identity,
    log_det_of,
    rounding_of_log_det,
    solve,
    spoilt,
)
from lightning_bayes.numerics.devices import accumulation_dtype
from lightning_bayes.row_storage.collector import (
    example_grams,
    fill_gram,
    principal_rows,
    smallest_set,
    tiles_of,
)
from lightning_bayes.row_storage.stored import KeptRows
from lightning_bayes.structures.base import total_memory

NEGLIGIBLE_NATS = 1e-3
"""What rows that are left out may add to the log-determinant in all, in nats, however large its rounding."""


TILE_ROWS, SMALLEST_TILE = 512, 128
"""Rows of one tile of the dual matrix: large enough for the matrix product, small beside the matrix."""


class Factor(ABC):
    """A lower factor L of A = I + K_SS, and what rows beyond S add to ln det A and to γ.

    γ is the derivative of ln det(I + tK) at t = 1. With R the Schur complement of A, less I, and k = K_Si of the rows
    i beyond S: R = K_ii − kᵀA⁻¹k, and its derivative is R − kᵀA⁻²k.
    """

    @abstractmethod
    def whiten(self, vectors: Tensor) -> Tensor:
        """L⁻¹ times vectors [S, ...]."""

    @abstractmethod
    def unwhiten(self, vectors: Tensor) -> Tensor:
        """L⁻ᵀ times vectors [S, ...]."""

    @property
    @abstractmethod
    def rows(self) -> Tensor:
        """L, or some of its columns: as many rows, of its type and on its device."""

    def trace_of_inverse(self) -> float:
        """Trace of A⁻¹."""
        identity = torch.eye(len(self.rows), dtype=self.rows.dtype, device=self.rows.device)
        return self.whiten(identity).square_().sum(dtype=accumulation_dtype(identity.device)).item()

    def trace_of_shrinkage(self, num_probes: int, exact_limit: int) -> tuple[float, float]:
        """Trace of K(I + K)⁻¹ = rows − tr (I + K)⁻¹, and its standard error.

        Exact up to a size; beyond it Hutchinson's estimate with random signs z: E zᵀ(I + K)⁻¹z = tr (I + K)⁻¹.
        """
        like, size = self.rows, len(self.rows)
        if size <= exact_limit:
            return size - self.trace_of_inverse(), 0.0
        generator = torch.Generator(device=like.device).manual_seed(0)
        signs = torch.randint(0, 2, (size, num_probes), generator=generator, device=like.device).to(like)
        squares = self.whiten(signs.mul_(2).sub_(1)).square()
        samples = size - squares.sum(0, dtype=accumulation_dtype(like.device))
        return samples.mean().item(), (samples.std() / num_probes**0.5).item()

    def added_by_each(self, diagonal: Tensor, cross: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ln(1 + R_ii) of each row by itself, and (R_ii − kᵀA⁻²k)/(1 + R_ii), its part of γ.

        Args:
            diagonal: K_ii [R].
            cross: K_SR [S, R], None for 0.
        """
        schur, inverse = diagonal, torch.zeros_like(diagonal)
        if cross is not None:
            half = self.whiten(cross)
            schur = (diagonal - half.square().sum(0)).clamp(min=0.0)
            inverse = self.unwhiten(half).square().sum(0)
        return schur.log1p(), ((schur - inverse) / (1.0 + schur)).clamp(min=0.0)

    def added_by_all(self, own: Tensor, cross: Tensor | None) -> tuple[float, float]:
        """Ln det(I + R) of rows together, and tr (I + R)⁻¹(R − kᵀA⁻²k), their part of γ.

        Args:
            own: K_RR [R, R].
            cross: K_SR [S, R], None for 0.
        """
        schur, grown = own, own
        if cross is not None:
            half = self.whiten(cross)
            whole = self.unwhiten(half)
            schur = own - (half.mT @ half).to(own)
            grown = schur - (whole.mT @ whole).to(own)
        factor = cholesky_in_place(schur.clone())
        if factor is None:
            raise spoilt()
        return log_det_of(factor), torch.cholesky_solve(grown, factor).diagonal().sum().item()


@dataclass(frozen=True)
class System(Factor):
    """A factor of I + K in one piece, and the order in which its rows stand.

    Attributes:
        rounding: Allowance for rounding in the log-determinant, nats.
    """

    factor: Tensor  # [rows, rows], lower
    tiles: list[slice]
    rounding: float = 0.0

    @property
    @override
    def rows(self) -> Tensor:
        return self.factor

    @override
    def trace_of_inverse(self) -> float:
        return diagonal_of_inverse(self.factor).sum().item()

    @override
    def whiten(self, vectors: Tensor) -> Tensor:
        whitened: Tensor = torch.linalg.solve_triangular(self.factor, vectors.to(self.factor), upper=False)
        return whitened

    @override
    def unwhiten(self, vectors: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve_triangular(self.factor.mT, vectors, upper=True)
        return solved

    def solve(self, coefficients: Tensor) -> Tensor:
        """(I + K)⁻¹ times coefficients [C, N], in their type."""
        columns = len(coefficients)
        ordered = torch.cat([coefficients[:, tile].flatten() for tile in self.tiles]).to(self.factor)
        solved = solve(self.factor, ordered.unsqueeze(1)).squeeze(1).to(coefficients)
        sizes = [columns * (tile.stop - tile.start) for tile in self.tiles]
        return torch.cat([part.unflatten(0, (columns, -1)) for part in solved.split(sizes)], dim=1)


def factorise(
    layers: Sequence[KeptRows],
    precision: Mapping[str, float],
    dtypes: Sequence[torch.dtype],
    small: int,
    allowed: float = SMALL_ROUNDING,
) -> System:
    """Factorise I + K in the first type that can be believed.

    Args:
        layers: V.
        precision: λ of each parameter tensor.
        dtypes: The types.
        small: See `Budget.small`.
        allowed: Rounding of the log-determinant, in nats, for which up to so many rows are not done again. More
            rows have `LARGE_ROUNDING`; infinity puts up with any.

    Raises:
        EvidenceUnavailableError: If none can.
    """
    size, accurate = layers[0].num_rows, dtypes[-1]
    trace = size + _trace(layers, precision)
    for dtype in dict.fromkeys(dtypes):
        rounding = rounding_of_log_det(trace, dtype)
        again = size <= small and dtype != accurate
        spoils = size > small and dtype != accurate and rounding > max(allowed, LARGE_ROUNDING)
        if spoils and _has_room(layers[0].rows.device, size, accurate, rounding):
            continue
        cast = [layer.to(dtype) for layer in layers]
        factor = cholesky_in_place(gram_of(cast, precision), allowed if again else math.inf)
        if factor is not None:
            return System(factor, tiles_of_system(layers), rounding)
        if dtype != accurate and size > small:
            warnings.warn(
                f"The Cholesky factor of {size} rows lost its digits in {dtype}; it is "
                f"computed again in {accurate}, which takes about twice as long and twice the memory. A larger "
                "prior precision avoids this.",
                stacklevel=2,
            )
    raise EvidenceUnavailableError(
        f"I + K of {size} rows is not positive definite even in {accurate}: the rows are of "
        "extreme scale. Raise the prior precision."
    )


def _trace(layers: Sequence[KeptRows], precision: Mapping[str, float]) -> float:
    diagonal = example_grams(layers, precision).diagonal(dim1=-2, dim2=-1)
    return diagonal.sum(dtype=accumulation_dtype(diagonal.device)).item()


def _has_room(device: torch.device, size: int, accurate: torch.dtype, rounding: float) -> bool:
    """Whether K fits in an accurate type; says what is done, with the rounding that it would be done for."""
    off = f"its log-determinant could be off by as much as {rounding:.2g} nats"
    if float(size) ** 2 * accurate.itemsize > total_memory(device):
        warnings.warn(
            f"K of {size:,} rows does not fit on {device} in {accurate}, and without {off}, which the bounds hold. "
            "A larger prior precision, or max_examples=, avoids this.",
            stacklevel=2,
        )
        return False
    logging.getLogger("lightning_bayes").info(
        "K of %s rows is factorised in %s, which takes about twice as long and twice the memory: without, %s. "
        "A larger prior precision avoids this.",
        f"{size:,}",
        accurate,
        off,
    )
    return True


def inverse_on(chosen: Tensor, inverse: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """(I + K_SS)⁻¹ on S and zero elsewhere, which makes it Woodbury's of the matrix that S alone gives.

    Args:
        chosen: Numbers of the rows of S.
        inverse: (I + K_SS)⁻¹ times coefficients [1, S].
    """

    def solve(coefficients: Tensor) -> Tensor:
        solved = torch.zeros_like(coefficients).flatten()
        solved[chosen] = inverse(coefficients.flatten()[chosen].unsqueeze(0)).squeeze(0)
        return solved.view_as(coefficients)

    return solve


def without_negligible(
    layers: Sequence[KeptRows], precision: Mapping[str, float], share: float
) -> tuple[Sequence[KeptRows], Tensor | None]:
    """The rows in their examples' eigenbasis, and the numbers of those that count; None for all.

    By Hadamard the others add at most Σ ln(1 + K_ii) to ln det(I + K). They may take eps · tr(I + K) in all, which
    a factor in floating point does not tell from nothing (sums over 10,000 entries near 1 round by more), and no
    more than `NEGLIGIBLE_NATS`, and are to be a share of all. Where the factor will be one in float64 all rows stay.
    What that saves is in docs/benchmarks/worth.md.
    """
    grams = example_grams(layers, precision)
    if not keeps_the_identity(grams.diagonal(dim1=-2, dim2=-1)):
        return layers, None
    eigenvalues = torch.linalg.eigvalsh(grams.to(accumulation_dtype(grams.device))).clamp_(min=0.0)
    rounding = torch.finfo(grams.dtype).eps * (eigenvalues.numel() + eigenvalues.sum().item())
    allowance = min(rounding, NEGLIGIBLE_NATS)
    ascending = eigenvalues.flatten().sort().values
    if (ascending.log1p().cumsum(0) <= allowance).sum() < share * len(ascending):
        return layers, None
    rows = principal_rows(layers, grams.to(eigenvalues))
    chosen = smallest_set(rows.eigenvalues, allowance)
    return rows.layers, chosen[rows.by_example(chosen)]


def tiles_of_system(layers: Sequence[KeptRows]) -> list[slice]:
    """Return the ranges of rows that the dual matrix is formed and read in."""
    columns, num_examples = layers[0].rows.shape[:2]
    tile_rows = min(TILE_ROWS, max(SMALLEST_TILE, num_examples * columns // 12))
    return tiles_of(num_examples, columns, tile_rows)


def gram_of(layers: Sequence[KeptRows], precision: Mapping[str, float]) -> Tensor:
    """The upper triangle of K, in the order of `tiles_of_system`."""
    size = layers[0].num_rows
    buffer = layers[0].rows.new_empty(size, size)
    fill_gram(buffer, layers, tiles_of_system(layers), precision)
    return buffer


def trace_of_product(
    matrix: Tensor, layer: KeptRows, tiles: list[slice], precision: Mapping[str, float]
) -> float:
    """Trace of a symmetric matrix, its rows in the order of the tiles, times the layer's share of K."""
    columns, total = len(layer.rows), 0.0
    ranges = [slice(tile.start * columns, tile.stop * columns) for tile in tiles]
    for part in layer.parts(layer.num_rows):
        pieces = [part.examples(tile) for tile in tiles]
        for i, left in enumerate(pieces):
            for j in range(i, len(pieces)):
                share = left.cross(pieces[j], precision)
                product = (share * matrix[ranges[i], ranges[j]]).sum(dtype=accumulation_dtype(matrix.device))
                total += (1.0 if i == j else 2.0) * product.item()
    return total

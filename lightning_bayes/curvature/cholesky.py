"""Cholesky factors of I + K for a positive semi-definite K, and whether rounding has left them any sense.

And its eigenvalues, beside them.
"""

import torch
from scipy.linalg import eigvalsh
from torch import Tensor

from lightning_bayes.curvature.base import accumulation_dtype
from lightning_bayes.curvature.errors import EvidenceUnavailableError

__all__ = ["cholesky", "cholesky_in_place", "eigenvalues_of", "log_det_of", "solve"]

ROUNDING_TOLERANCE = 1e-2
"""Rounding of the largest entry of I + K, relative to the 1, beyond which its factor is not believed."""


def cholesky_in_place(buffer: Tensor) -> Tensor | None:
    """Lower factor of I + K from the upper triangle of K, in K's memory; None where rounding has spoilt it."""
    # The upper triangle row by row is the lower one column by column, which LAPACK factorises in place.
    matrix = buffer.mT
    matrix.diagonal().add_(1.0)
    if not _keeps_the_identity(matrix):
        return None
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return matrix if _is_believable(matrix, info) else None


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factor of I + K, given as such.

    Raises:
        EvidenceUnavailableError: If rounding has spoilt it.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not _keeps_the_identity(matrix) or not _is_believable(factor, info):
        raise EvidenceUnavailableError(
            "The curvature plus the prior is not positive definite in floating point: the gradients are of "
            "extreme scale. Raise the prior precision."
        )
    return factor


def log_det_of(factor: Tensor) -> float:
    """Log-determinant of L Lᵀ."""
    return 2.0 * factor.diagonal().log().sum(dtype=accumulation_dtype(factor.device)).item()


def solve(factor: Tensor, vectors: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ times vectors [rows, ...].

    Not `cholesky_solve`, which copies the factor: that would be a second matrix of rows × rows.
    """
    half = torch.linalg.solve_triangular(factor, vectors, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solved


def eigenvalues_of(matrix: Tensor) -> Tensor:
    """Eigenvalues of a positive semi-definite matrix from its upper triangle, rounding below zero cut off."""
    if matrix.device.type == "cpu":  # SciPy's LAPACK took half the time of torch's, measured on an AMD EPYC
        values = torch.from_numpy(eigvalsh(matrix.numpy(), lower=False, check_finite=False))
    else:
        values = torch.linalg.eigvalsh(matrix, UPLO="U")
    return values.clamp_(min=0.0)


def _keeps_the_identity(matrix: Tensor) -> bool:
    """Whether the 1 in I + K survives beside the largest K: the factor's errors are of that entry's rounding.

    Pivots alone do not tell: rounding lifts as many of them as it lowers.
    """
    rounding = torch.finfo(matrix.dtype).eps * matrix.diagonal().max().item()
    return rounding <= ROUNDING_TOLERANCE


def _is_believable(factor: Tensor, info: Tensor) -> bool:
    """Whether every pivot of I + K is at least 1, as K is positive semi-definite: less is rounding, seen."""
    smallest = factor.diagonal().square().min().item()
    return info.item() == 0 and smallest > 1.0 - ROUNDING_TOLERANCE

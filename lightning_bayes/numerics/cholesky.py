"""Cholesky factors of I + K for a positive semi-definite K, and whether rounding has left them any sense.

And its eigenvalues, beside them.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from scipy.linalg import eigvalsh
from torch import Tensor

from lightning_bayes.errors import EvidenceUnavailableError
from lightning_bayes.numerics.devices import accumulation_dtype

ROUNDING_TOLERANCE = 1e-2
"""Rounding of the largest entry of I + K, relative to the 1, beyond which its factor is not believed."""

ROUNDING_FACTOR = 16
"""Allowance for rounding in the log-determinant, in units of eps · tr(I + K)."""
SMALL_ROUNDING = 0.1
"""Such an allowance, in nats, for which a small matrix is not done again in float64; of it a hundredth was seen."""
LARGE_ROUNDING = 0.25
"""Such an allowance, in nats, for which a large matrix is not: up to a twenty-fifth of it was seen, 0.01 nats."""
SMALLEST_SPLIT = 128
"""Rows from which on a triangular matrix is inverted by halves, whose products are quicker than a solve."""


def whitening(precision: Mapping[str, float], sizes: Mapping[str, int], like: Tensor) -> Tensor:
    """Λ⁻¹ᐟ² [p] from the λ and the sizes of the parameter tensors, of the type and on the device of a tensor."""
    return torch.cat([like.new_full((size,), precision[name] ** -0.5) for name, size in sizes.items()])


def whitened(matrix: Tensor, scale: Tensor) -> Tensor:
    """Λ⁻¹ᐟ² G Λ⁻¹ᐟ² from Λ⁻¹ᐟ²; what stands below the diagonal of G stays there."""
    return (scale.unsqueeze(1) * matrix).mul_(scale)


def cholesky_in_place(buffer: Tensor, allowed: float = math.inf) -> Tensor | None:
    """Lower factor of I + K from the upper triangle of K, in K's memory; None where rounding has spoilt it.

    Args:
        buffer: K [rows, rows].
        allowed: Rounding of the log-determinant, in nats, that is put up with.
    """
    # The upper triangle row by row is the lower one column by column, which LAPACK factorises in place.
    matrix = buffer.mT
    matrix.diagonal().add_(1.0)
    trace = matrix.diagonal().sum().item()
    if not keeps_the_identity(matrix.diagonal()) or not rounding_of_log_det(trace, matrix.dtype) <= allowed:
        return None
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return matrix if _is_believable(matrix, info) else None


def spoilt() -> EvidenceUnavailableError:
    """What is to be raised where float64 does not do either."""
    return EvidenceUnavailableError(
        "The curvature plus the prior is not positive definite in floating point: the gradients are of "
        "extreme scale. Raise the prior precision."
    )


def log_det_of(factor: Tensor) -> float:
    """Log-determinant of L Lᵀ."""
    return 2.0 * factor.diagonal().log().sum(dtype=accumulation_dtype(factor.device)).item()


def rounding_of_log_det(trace: float, dtype: torch.dtype) -> float:
    """Allowance, in nats, for rounding in ln det(I + K) by a Cholesky factor, whose inverse is at most I.

    Args:
        trace: Of I + K.
        dtype: Of the factor.
    """
    return ROUNDING_FACTOR * torch.finfo(dtype).eps * trace


def bounds_of(log_det: float, rounding: float) -> tuple[float, float]:
    """Bounds on an exact log-determinant: itself, or with its rounding where that is not small.

    Args:
        log_det: In nats.
        rounding: Allowance for its rounding, in nats.
    """
    if rounding <= LARGE_ROUNDING:
        return log_det, log_det
    return max(log_det - rounding, 0.0), log_det + rounding


def diagonal_of_inverse(factor: Tensor) -> Tensor:
    """Diagonal of (L Lᵀ)⁻¹: the squared norms of the columns of L⁻¹, half the work of the inverse."""
    inverse = torch.zeros_like(factor)
    _invert_triangle(factor, inverse)
    return inverse.square_().sum(0).to(accumulation_dtype(factor.device))


def shrinkage_of(factor: Tensor, sizes: Iterable[int]) -> list[float]:
    """Trace of I − (L Lᵀ)⁻¹, that is K(I + K)⁻¹, over blocks of the diagonal of these sizes."""
    return [(1.0 - part).sum().item() for part in diagonal_of_inverse(factor).split(list(sizes))]


def _invert_triangle(factor: Tensor, inverse: Tensor) -> None:
    """L⁻¹ of a lower factor into zeros, by halves: ((A, 0), (C, D))⁻¹ = ((A⁻¹, 0), (−D⁻¹CA⁻¹, D⁻¹))."""
    size = len(factor)
    if size <= SMALLEST_SPLIT:
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        inverse.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))
        return
    first, last = slice(0, size // 2), slice(size // 2, size)
    _invert_triangle(factor[first, first], inverse[first, first])
    _invert_triangle(factor[last, last], inverse[last, last])
    product = inverse[last, last] @ (factor[last, first] @ inverse[first, first])
    torch.neg(product, out=inverse[last, first])


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


def keeps_the_identity(diagonal: Tensor) -> bool:
    """Whether the 1 in I + K survives beside the largest K: the factor's errors are of that entry's rounding.

    Pivots alone do not tell: rounding lifts as many of them as it lowers.
    """
    rounding = torch.finfo(diagonal.dtype).eps * diagonal.max().item()
    return rounding <= ROUNDING_TOLERANCE


def _is_believable(factor: Tensor, info: Tensor) -> bool:
    """Whether every pivot of I + K is at least 1, as K is positive semi-definite: less is rounding, seen."""
    smallest = factor.diagonal().square().min().item()
    return info.item() == 0 and smallest > 1.0 - ROUNDING_TOLERANCE

"""The largest eigenvalue of a symmetric matrix that is known by its products with vectors alone.

Lanczos' method with full reorthogonalisation and thick restarts. It stays on the device of the model, and it asks
after each product whether the eigenvalue is known well enough: a product is a pass over the data, and ARPACK
(`scipy.sparse.linalg.eigsh`) asks after every `ncv` of them. The tests hold it against ARPACK and dense matrices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BYTES = 1e9
"""Memory of the basis; fewer vectors are kept between restarts where they are longer."""
LARGEST_BASIS = 64
SMALLEST_BASIS = 4
SYMMETRY = 10.0
"""Square roots of machine precision by which a matrix may differ from its transpose."""


@dataclass(frozen=True)
class Eigenpair:
    """The largest eigenvalue that was found, and how well it is known.

    Attributes:
        value: θ = vᵀAv, at most the largest eigenvalue.
        error: ‖Av − θv‖: some eigenvalue lies within so much of θ.
        vector: v, [p], of norm 1.
        converged: Whether the error met the tolerance within the products that were allowed.
    """

    value: float
    error: float
    vector: Tensor
    num_products: int
    converged: bool


def largest_eigenpair(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    *,
    tolerance: float,
    max_products: int,
    seed: int = 0,
) -> Eigenpair:
    """Find the algebraically largest eigenvalue of A with its eigenvector.

    θ is a Rayleigh quotient, so the largest eigenvalue is at least θ, and an eigenvalue lies within
    ‖Av − θv‖ of it (Parlett, The Symmetric Eigenvalue Problem, 1998, section 4.5). That this one is the
    largest is not certified; a random start misses the top of the spectrum with probability 0, and Lanczos
    finds its ends first.

    Args:
        product: v [p] -> A v [p] for a symmetric A.
        like: Some vector [p], of whose type and device all are.
        tolerance: Accepted ‖Av − θv‖/|θ|.
        max_products: Products that may be taken, at least 2; the last one measures the error.
        seed: Of the random vector to start from.

    Raises:
        ValueError: If the products are not those of a symmetric matrix.
    """
    # On the CPU, so that the same seed is the same vector on every device.
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(like), generator=generator, dtype=like.dtype).to(like.device)
    lanczos = _Lanczos(product, start / start.norm(), max_products - 1)
    vector = lanczos.run(tolerance)
    vector = vector / vector.norm()
    image = product(vector)
    value = torch.dot(vector, image).item()
    error = (image - value * vector).norm().item()
    # Products round: asking for less than that would never end.
    rounding = SYMMETRY * torch.finfo(like.dtype).eps * lanczos.scale
    converged = error <= max(tolerance * abs(value), rounding)
    return Eigenpair(value, error, vector, lanczos.num_products + 1, converged)


def orthogonalised(images: Tensor, bases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The part of vectors that is orthogonal to bases of their own, and their coefficients in these.

    Twice: rounding leaves a part of the basis after the first time (Parlett 1998, section 6.9).

    Args:
        images: Vectors [k, n].
        bases: Pieces [s, k, n] of the k bases, orthonormal or zero.

    Returns:
        Vectors [k, n], and coefficients [sum of s, k].
    """
    total = images.new_zeros(())
    for _ in range(2):
        # Vector by vector: of pieces with s = 1 a product of all takes some twenty times as long.
        coefficients = [
            torch.stack([own @ image for own, image in zip(basis.unbind(1), images, strict=True)], 1)
            for basis in bases
        ]
        for basis, share in zip(bases, coefficients, strict=True):
            images = images - torch.einsum("sk,skn->kn", share, basis)
        total = total + torch.cat(coefficients)
    return images, total


class _Lanczos:
    """An orthonormal basis Q of a Krylov space, and what A is in it."""

    def __init__(self, product: Callable[[Tensor], Tensor], start: Tensor, max_products: int) -> None:
        room = int(MAX_BYTES // (len(start) * start.element_size()))
        size = min(max(room, SMALLEST_BASIS), LARGEST_BASIS, len(start))
        self._product = product
        self._next = start
        self._max_products = max_products
        self._basis = start.new_empty(size, len(start))
        self._matrix = torch.zeros(size, size, dtype=torch.float64)  # QᵀAQ as it was measured
        self._eps = torch.finfo(start.dtype).eps
        self._used = 0
        self.num_products = 0
        self.scale = 0.0
        """The largest |eigenvalue| seen."""

    def run(self, tolerance: float) -> Tensor:
        """Return the vector of the largest Ritz value, once its residual is within the tolerance."""
        while True:
            remainder, beta = self._extend()
            used = self._used
            values, vectors = torch.linalg.eigh(self._matrix[:used, :used], UPLO="U")
            self.scale = max(self.scale, values.abs().max().item())
            coupling = beta * vectors[-1]  # ‖A Qs − θ Qs‖ = β |last entry of s|
            best = values[-1].item()
            enough = abs(coupling[-1].item()) <= tolerance * abs(best)
            exhausted = beta <= SYMMETRY * self._eps * self.scale or used == len(remainder)
            if enough or exhausted or self.num_products >= self._max_products:
                self._check_symmetric()
                best_vector: Tensor = self._basis[:used].mT @ vectors[:, -1].to(self._basis)
                return best_vector
            if used == len(self._basis):
                self._check_symmetric()
                used = self._restart(values, vectors, coupling)
            else:
                self._matrix[used, used - 1] = beta
            self._next, self._used = remainder / beta, used

    def _extend(self) -> tuple[Tensor, float]:
        """Add a vector to the basis and take the part of its image that the basis does not hold."""
        self._basis[self._used] = self._next
        self._used += 1
        basis = self._basis[: self._used]
        image = self._product(self._next)
        self.num_products += 1
        image, coefficients = orthogonalised(image.unsqueeze(0), [basis.unsqueeze(1)])
        image = image.squeeze(0)
        self._matrix[: self._used, self._used - 1] = coefficients.squeeze(1).cpu().double()
        return image, image.norm().item()

    def _restart(self, values: Tensor, vectors: Tensor, coupling: Tensor) -> int:
        """Keep the upper half of the Ritz vectors."""
        kept = len(values) // 2
        self._basis[:kept] = vectors[:, -kept:].mT.to(self._basis) @ self._basis
        self._matrix.zero_()
        self._matrix.diagonal()[:kept] = values[-kept:]
        self._matrix[kept, :kept] = coupling[-kept:]
        return kept

    def _check_symmetric(self) -> None:
        """Below the diagonal stands the same product, measured the other way round."""
        matrix = self._matrix[: self._used, : self._used]
        difference = (matrix.tril(-1) - matrix.triu(1).mT).abs().max().item()
        if difference > SYMMETRY * self._eps**0.5 * self.scale:
            raise ValueError(
                f"The products with vectors are not those of a symmetric matrix, by {difference:g} of "
                f"{self.scale:g}: some operation of this network has a wrong second derivative in PyTorch "
                "(torch.nn.utils.parametrizations.weight_norm is known for it), or its loss is another at each "
                'call. curvature="ggn" needs no second derivatives of the network.'
            )

"""A matrix from below by few products: Nyström's approximation from random vectors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bayes.numerics.devices import accumulation_dtype


@dataclass(frozen=True)
class NystromSketch:
    """U diag(e) Uᵀ ≤ A, but for rounding."""

    vectors: Tensor  # U [r, n], orthonormal rows
    values: Tensor  # e [r] ≥ 0, in the accurate type

    def shifted_power(self, vectors: Tensor, scale: float, power: float) -> Tensor:
        """(I + U diag(e) Uᵀ/scale)**power times vectors [k, n]."""
        change = (1.0 + self.values / scale) ** power - 1.0
        along = (vectors @ self.vectors.mT) * change.to(vectors)
        return vectors + along @ self.vectors


def nystrom_sketch(
    product: Callable[[Tensor], Tensor], like: Tensor, rank: int, at_once: int, seed: int = 0
) -> NystromSketch:
    """Approximate a positive semi-definite A by AΩ(ΩᵀAΩ)⁻¹(AΩ)ᵀ for `rank` random directions Ω.

    With a shift that keeps the small matrix positive definite (Tropp et al., *Fixed-rank approximation of a
    positive-semidefinite matrix from streaming data*, NeurIPS 2017, algorithm 3).

    Args:
        product: Vectors [k, n] -> A times each.
        like: A vector [n], of whose type and device all are.
        rank: r, at most n.
        at_once: Vectors of one product.
        seed: Of Ω.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(rank, len(like), generator=generator, dtype=like.dtype).to(like.device)
    directions = torch.linalg.qr(draws.mT)[0].mT.contiguous()
    images = torch.cat([product(some) for some in directions.split(at_once)])
    accurate = accumulation_dtype(like.device)
    shift = torch.finfo(like.dtype).eps * torch.linalg.vector_norm(images).item() * len(like) ** 0.5
    images = images + shift * directions
    inner = (directions @ images.mT).to(accurate)
    values, vectors = torch.linalg.eigh(0.5 * (inner + inner.mT))
    positive = values > shift * 1e-3
    half = (vectors[:, positive] * values[positive].rsqrt()).mT.to(images) @ images  # [r', n]
    _, sizes, basis = torch.linalg.svd(half, full_matrices=False)
    return NystromSketch(basis, (sizes.to(accurate).square() - shift).clamp(min=0.0))

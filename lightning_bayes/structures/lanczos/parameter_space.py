"""The estimate in the space of parameters, for outputs too many for their columns: a sketch of G, random vectors.

With G̃ = Λ^-½ G Λ^-½ and P = I + U diag(e) Uᵀ ≤ I + G̃ from Nyström's sketch (Frangella, Tropp & Udell, SIAM J. Matrix
Anal. Appl. 2023), ln det(I + G̃) = Σ ln(1 + e) + tr ln P^-½ (I + G̃) P^-½. The first term is a certified lower bound.
Products with G are passes over the data, in which the likelihood's Hessian is applied to vectors.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bayes.numerics.nystrom import NystromSketch, nystrom_sketch
from lightning_bayes.row_storage.newton_decrement import climbed_by_products
from lightning_bayes.rows.products import DataPasses
from lightning_bayes.rows.rows import RowChunk
from lightning_bayes.structures.base import Problem
from lightning_bayes.structures.lanczos.cost import SKETCHED
from lightning_bayes.structures.lanczos.estimate import SampledLogDet
from lightning_bayes.structures.lanczos.known_part import DECREMENT_STEPS, KnownPart


class ParameterSpaceLanczos(SampledLogDet):
    """No row: products with G, all by passes over the data."""

    reads_rows = False
    rereads = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if problem.passes is None:
            raise ValueError("structure='lanczos' reads such data more than once.")
        self.whitened = WhitenedGGN(problem.passes(), self.shape)
        self._sketch: NystromSketch | None = None

    @override
    def update(self, chunk: RowChunk) -> None:
        """Nothing is kept."""

    @override
    def known_part(self, scale: float) -> "SketchedPart":
        like = self.like()
        if self._sketch is None:
            # Some six tensors of that size while it is made.
            fitting = int(self.problem.budget.basis_bytes / (6 * len(like) * like.element_size()))
            rank = max(1, min(SKETCHED, len(like), fitting))
            self._sketch = nystrom_sketch(
                self.whitened.product, like, rank, self.problem.num_probes, self.problem.seed
            )
        return SketchedPart(self.whitened, self._sketch, like, scale)

    @override
    def like(self) -> Tensor:
        return torch.empty(self.problem.num_parameters, dtype=self.problem.dtype, device=self.problem.device)


class WhitenedGGN:
    """G̃ = Λ^-½ G Λ^-½ in the entries of all parameters, one after the other: [k, p]."""

    def __init__(self, passes: DataPasses, precision: Mapping[str, float]) -> None:
        self._passes, self.precision = passes, precision
        self.shapes = {name: passes.parameters[name].shape for name in precision}

    def product(self, vectors: Tensor) -> Tensor:
        """G̃ times vectors [k, p]."""
        return self.joined(self._passes.product(self.apart(vectors)))

    def apart(self, vectors: Tensor) -> dict[str, Tensor]:
        """Λ^-½ times vectors [k, p], tensor by tensor [k, *shape]."""
        parts = vectors.split([shape.numel() for shape in self.shapes.values()], 1)
        return {
            name: part.reshape(len(part), *shape) / self.precision[name] ** 0.5
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Λ^-½ times vectors {name: [k, *shape]}, [k, p]."""
        scaled = ((parts[name] / self.precision[name] ** 0.5, shape) for name, shape in self.shapes.items())
        return torch.cat([part.reshape(len(part), shape.numel()) for part, shape in scaled], 1)


class SketchedPart(KnownPart):
    """P at one prior, and M = P^-½ (I + G̃/s) P^-½, whose eigenvalues are 1 at least."""

    least = 1.0

    def __init__(self, whitened: WhitenedGGN, sketch: NystromSketch, like: Tensor, scale: float) -> None:
        self._whitened, self._sketch, self._scale = whitened, sketch, scale
        self.log_det = (sketch.values / scale).log1p().sum().item()
        self.gamma = (sketch.values / (sketch.values + scale)).sum().item()
        self.bounds = self.log_det, math.inf
        self.magnitude = len(sketch.values) + (sketch.values / scale).sum().item()

    @override
    def masked(self, vectors: Tensor) -> Tensor:
        return vectors

    @override
    def product(self, vectors: Tensor) -> Tensor:
        inner = self._sketch.shifted_power(vectors, self._scale, -0.5)
        curved = inner + self._whitened.product(inner) / self._scale
        return self._sketch.shifted_power(curved, self._scale, -0.5)

    @override
    def gamma_image(self, vectors: Tensor, solved: Tensor) -> Tensor:
        # tr (I − (I + G̃)⁻¹) = tr (I − P⁻¹) + tr P⁻¹(I − M⁻¹)
        return self._sketch.shifted_power(vectors - solved, self._scale, -1.0)

    @override
    def quadratic_form(self, gradient: Mapping[str, Tensor], tolerance: float) -> tuple[float, float]:
        # gᵀ(G + sΛ)⁻¹g = g̃ᵀ(I + G̃/s)⁻¹g̃ with g̃ = (sΛ)^-½ g
        start = self._whitened.joined({name: part.unsqueeze(0) for name, part in gradient.items()})
        value, missing, _ = climbed_by_products(
            lambda v: v + self._whitened.product(v) / self._scale,
            lambda v: self._sketch.shifted_power(v, self._scale, -1.0),
            start / self._scale**0.5,
            tolerance,
            DECREMENT_STEPS,
        )
        return value, missing

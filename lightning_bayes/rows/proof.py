"""The proof of rows: in every batch the rows of all examples, added up with weights, are autograd's gradient.

With random weights wₙ and ρ_c, Σₙ wₙ Σ_c ρ_c v₍ₙ,c₎ is the gradient of Σₙ wₙ Σ_c ρ_c ⟨f(xₙ), R[c, n]⟩ in the
parameters. The left side weighs *rows*, the right side *outputs*: an example whose rows are wrong, or are another's,
shows. Rows are linear in the gradients of outputs, so that one column Σ_c ρ_c R[c, n] stands for all; and what is
wrong in a matrix shows along a random direction u vᵀ of it, for which a linear map's rows need not be multiplied out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import methodcaller

import torch
from torch import Tensor

from lightning_bayes.rows.backward import Proof, gradients, random_signed
from lightning_bayes.rows.rows import DenseRows, Rows

ROUNDING = 3e3
"""Allowed difference along a random direction, in units of the type's rounding, relative to a gradient's norm.

Sums over 4,000 columns in another order differ by some 450 units, where what is added nearly cancels."""
SMALLEST_SCALE = 0.1
"""That norm counts as at least this much of the largest of all: what cancels is rounded as its terms are."""

FLAT = 2**16
"""Parameters up to which truths are compared in one go, where calls take longer than what they do."""


def wrong_parameters(
    proof: Proof,
    parameters: Mapping[str, Tensor],
    directions: "Directions",
    layers: Sequence[Rows],
    of_all_columns: bool,
) -> list[str]:
    """Parameters whose rows are not autograd's, in one backward pass and a weighted sum of rows.

    Args:
        proof: From `proof_of`.
        parameters: Those that are tried.
        directions: Of these parameters.
        layers: Rows of `proof.batch`, or of all columns of the batch, if they are at hand.
        of_all_columns: Which they are. Those that are formed together for whoever asks next are then tried
            themselves, of others the one column that stands for all.
    """
    column = proof.column[0]
    seed = proof.weights.reshape(-1, *[1] * (column.dim() - 1)) * column
    truths = gradients(proof.source.outputs, list(parameters.values()), seed)
    in_one_column = cache(
        methodcaller("one_column", proof.columns)
    )  # parameters of one use share it as before
    projections: dict[str, Tensor] = {}
    for rows in layers:
        if directions.pairs.keys().isdisjoint(rows.names):
            continue
        if not of_all_columns:
            projections |= rows.projected(proof.weights, directions.pairs)
        elif isinstance(rows, DenseRows) and rows.kept_when_formed:
            projections |= rows.projected(torch.outer(proof.weights, proof.columns), directions.pairs)
        else:
            projections |= rows.with_uses(in_one_column).projected(proof.weights, directions.pairs)
    return _different(projections, dict(zip(parameters, truths, strict=True)), directions)


@dataclass(frozen=True)
class Directions:
    """Random directions u vᵀ: u for the first dimension of a parameter and v for the others.

    Attributes:
        pairs: u and v of each parameter.
        flat: u vᵀ of all of them one after the other, None where that would be long.
        places: Of which parameter each entry of it is.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    flat: Tensor | None
    places: Tensor | None

    @classmethod
    def draw(cls, parameters: Mapping[str, Tensor]) -> "Directions":
        """Draw one pair for each parameter."""
        generator = torch.Generator().manual_seed(0)
        like = next(iter(parameters.values())).detach()
        pairs = {}
        for name, parameter in parameters.items():
            first = parameter.shape[0] if parameter.dim() else 1
            others = parameter.numel() // first
            right = random_signed(others, like, generator) if others > 1 else like.new_ones(1)
            pairs[name] = random_signed(first, like, generator), right
        sizes = torch.tensor([parameter.numel() for parameter in parameters.values()])
        if int(sizes.sum()) > FLAT:
            return cls(pairs, None, None)
        flat = torch.cat([torch.outer(left, right).flatten() for left, right in pairs.values()])
        return cls(pairs, flat, torch.arange(len(sizes)).repeat_interleave(sizes).to(like.device))

    def along(self, truths: Mapping[str, Tensor | None]) -> Tensor:
        """⟨u vᵀ, t⟩ of each, 0 for None."""
        if self.flat is None or self.places is None:
            zero = next(iter(self.pairs.values()))[0].new_zeros(())
            pairs = zip(self.pairs.values(), truths.values(), strict=True)
            return torch.stack([zero if t is None else u @ t.reshape(len(u), -1) @ v for (u, v), t in pairs])
        parts = [
            self.flat.new_zeros(len(left) * len(right)) if truth is None else truth.reshape(-1)
            for (left, right), truth in zip(self.pairs.values(), truths.values(), strict=True)
        ]
        whole: Tensor = torch.cat(parts).to(self.flat)
        sums: Tensor = self.flat.new_zeros(len(parts))
        return sums.index_add(0, self.places, whole * self.flat)


def _different(
    projections: Mapping[str, Tensor], truths: Mapping[str, Tensor | None], directions: Directions
) -> list[str]:
    """Names whose rows are not the truth; what is in neither is zero in both."""
    expected = directions.along(truths)
    zero = expected.new_zeros(())
    difference = (torch.stack([projections.get(name, zero) for name in truths]) - expected).abs()
    # What is expected is of the gradient's norm in size, now and then smaller: the norms, which take as long as the
    # whole comparison, are for where that is not enough.
    if _is_within(difference, expected.abs()).all():
        return []
    norms = torch.stack(
        [zero if t is None else torch.linalg.vector_norm(t).to(zero) for t in truths.values()]
    )
    fine = _is_within(difference, norms).tolist()  # one wait for the device for all parameters
    return [name for name, is_fine in zip(truths, fine, strict=True) if not is_fine]


def _is_within(difference: Tensor, size: Tensor) -> Tensor:
    return difference <= ROUNDING * torch.finfo(size.dtype).eps * size.clamp(min=SMALLEST_SCALE * size.max())

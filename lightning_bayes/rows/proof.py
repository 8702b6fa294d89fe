"""The proof of a plan: in every batch the rows of all examples, added up with weights, are autograd's gradient.

With random weights wₙ and ρ_c, Σₙ wₙ Σ_c ρ_c v₍ₙ,c₎ is the gradient of Σₙ wₙ Σ_c ρ_c ⟨f(xₙ), R[c, n]⟩ in the
parameters. The left side weighs *rows*, the right side *outputs*: an example whose rows are wrong, or are another's,
shows. Rows are linear in the gradients of outputs, so that one column Σ_c ρ_c R[c, n] stands for all; and what is
wrong in a matrix shows along a random direction u vᵀ of it, for which a linear map's rows need not be multiplied out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_bayes.rows.backward import Batch, gradients, one_column
from lightning_bayes.rows.routes import GRAPH, Plan
from lightning_bayes.rows.rows import DenseRows, OuterRows, Rows
from lightning_bayes.rows.uses import Use

ROUNDING = 3e3
"""Allowed difference along a random direction, in units of the type's rounding, relative to a gradient's norm.

Sums over 4,000 columns in another order differ by some 450 units, where what is added nearly cancels."""
SMALLEST_SCALE = 0.1
"""That norm counts as at least this much of the largest of all: what cancels is rounded as its terms are."""

FLAT = 2**16
"""Parameters up to which truths are compared in one go, where calls take longer than what they do."""


@dataclass(frozen=True)
class Proof:
    """One column that stands for all of a batch, and a weight for each example.

    Attributes:
        source: The batch after the backward passes of some or all columns.
        column: Σ_c ρ_c R[c, n], [1, N, ...].
        weights: wₙ, [N].
        columns: ρ_c, [C].
    """

    source: Batch
    column: Tensor
    weights: Tensor
    columns: Tensor

    @cached_property
    def batch(self) -> Batch:
        """The batch with the one column."""
        source, calls = self.source, self.source.calls
        if len(source.roots) == len(self.columns):
            grads = [
                [None if grad is None else one_column(self.columns, grad) for grad in of_call]
                for of_call in source.grads
            ]
        else:  # of the columns that follow nothing is known yet
            tensors = [tensor for call in calls for tensor in call.outputs]
            parts = iter(gradients(source.outputs, tensors, self.column[0]))
            grads = [[_as_column(next(parts)) for _ in call.outputs] for call in calls]
        return Batch(calls, source.outputs, self.column, grads)


def proof_of(batch: Batch, roots: Tensor) -> Proof | None:
    """What a plan is tried on, None where no example has a row.

    Args:
        batch: After the backward passes of some or all columns.
        roots: All columns, [C, N, ...].
    """
    roots = roots.detach()
    if not len(roots):
        return None
    generator = torch.Generator().manual_seed(len(roots) + batch.num_examples)
    columns = _random(len(roots), roots, generator)
    column = one_column(columns, roots)
    if not bool(column.any()):  # as are all roots then
        return None
    return Proof(batch, column, _random(batch.num_examples, roots, generator), columns)


def wrong_parameters(plan: Plan, proof: Proof, layers: Sequence[Rows] | None = None) -> list[str]:
    """Parameters whose rows are not autograd's, in one backward pass and a weighted sum of rows.

    Those that go by the graph are autograd's by definition.

    Args:
        plan: To be tried.
        proof: From `proof_of`.
        layers: The plan's rows of all columns of the batch, if they are at hand: those that are formed together
            for whoever asks next are tried themselves.
    """
    parameters = {name: p for name, p in plan.parameters.items() if plan.ways[name] != GRAPH and p.numel()}
    if not parameters:
        return []
    column = proof.column[0]
    seed = proof.weights.reshape(-1, *[1] * (column.dim() - 1)) * column
    truths = gradients(proof.source.outputs, list(parameters.values()), seed)
    key = "directions:" + " ".join(parameters)
    if key not in plan.cache:
        plan.cache[key] = Directions.draw({name: p.shape for name, p in parameters.items()}, proof.weights)
    directions: Directions = plan.cache[key]
    projections: dict[str, Tensor] = {}
    if layers is not None:
        projections, layers = _of_formed(layers, proof, directions.pairs)
        layers = _of_one_column(layers, proof.columns)
    else:
        layers = plan.layers(proof.batch)
    projections |= _projections(layers, proof, directions.pairs)
    return _different(projections, dict(zip(parameters, truths, strict=True)), directions)


def _of_formed(
    layers: Sequence[Rows], proof: Proof, directions: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], list[Rows]]:
    """The same as `_projections` of rows that are kept for the structure once they are formed; and the others."""
    projections: dict[str, Tensor] = {}
    others: list[Rows] = []
    weights = torch.outer(proof.weights, proof.columns).flatten()  # wₙ ρ_c
    for rows in layers:
        if not isinstance(rows, DenseRows) or rows.name not in directions or not rows.kept_when_formed:
            others.append(rows)
            continue
        try:
            formed = rows.dense()[rows.name]
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # as in `_projections`
            continue
        formed = formed.transpose(0, 1).flatten(0, 1)  # as they lie in memory
        projections[rows.name] = _along(weights.to(formed) @ formed, *directions[rows.name])
    return projections, others


def _of_one_column(layers: Sequence[Rows], columns: Tensor) -> list[Rows]:
    """The rows with one column that stands for all; parameters of one use share it as before."""
    made: dict[int, Any] = {}

    def of(use: Use) -> Any:  # of the same kind
        if id(use) not in made:
            made[id(use)] = use.one_column(columns)
        return made[id(use)]

    return [
        replace(rows, uses=tuple(of(use) for use in rows.uses))
        if isinstance(rows, OuterRows)
        else replace(rows, uses=tuple((name, of(use)) for name, use in rows.uses))
        for rows in layers
    ]


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
    def draw(cls, shapes: Mapping[str, torch.Size], like: Tensor) -> "Directions":
        """Draw one pair for each shape."""
        generator = torch.Generator().manual_seed(0)
        pairs = {name: _direction(shape, like, generator) for name, shape in shapes.items()}
        sizes = torch.tensor([shape.numel() for shape in shapes.values()])
        if int(sizes.sum()) > FLAT:
            return cls(pairs, None, None)
        flat = torch.cat([torch.outer(left, right).flatten() for left, right in pairs.values()])
        return cls(pairs, flat, torch.arange(len(sizes)).repeat_interleave(sizes).to(like.device))

    def along(self, truths: Mapping[str, Tensor | None]) -> Tensor:
        """⟨u vᵀ, t⟩ of each, 0 for None."""
        if self.flat is None or self.places is None:
            zero = next(iter(self.pairs.values()))[0].new_zeros(())
            return torch.stack(
                [zero if t is None else _along(t, *self.pairs[name]) for name, t in truths.items()]
            )
        parts = [
            self.flat.new_zeros(len(self.pairs[name][0]) * len(self.pairs[name][1]))
            if truth is None
            else truth.reshape(-1)
            for name, truth in truths.items()
        ]
        whole: Tensor = torch.cat(parts).to(self.flat)
        sums: Tensor = self.flat.new_zeros(len(parts))
        return sums.index_add(0, self.places, whole * self.flat)


def _direction(shape: torch.Size, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """U for the first dimension of a parameter and v for the others: what is wrong shows along u vᵀ."""
    first = shape[0] if shape else 1
    others = shape.numel() // first
    right = _random(others, like, generator) if others > 1 else like.new_ones(1)
    return _random(first, like, generator), right


def _projections(
    layers: Sequence[Rows], proof: Proof, directions: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """⟨u vᵀ, Σₙ wₙ v₍ₙ,₀₎⟩ of each parameter."""
    projections: dict[str, Tensor] = {}
    for rows in layers:
        if directions.keys().isdisjoint(rows.names):
            continue
        if isinstance(rows, OuterRows):
            projections |= rows.projected(proof.weights, directions)
        else:
            try:
                total = rows.weighted_total(proof.weights)[rows.name]
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:
                continue  # a backward pass that vmap does not know: these rows cannot be formed, and are wrong
            projections[rows.name] = _along(total, *directions[rows.name])
    return projections


def _along(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left @ total.reshape(len(left), -1) @ right


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


def _as_column(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.unsqueeze(0)


def _random(size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of either sign between a half and three halves in size."""
    sizes = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    signs = torch.randint(2, (size,), generator=generator) * 2 - 1
    return (sizes * signs).to(like)

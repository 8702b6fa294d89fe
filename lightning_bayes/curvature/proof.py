"""The proof of a plan: in every batch the rows of all examples, added up with weights, are autograd's gradient.

With random weights wₙ and ρ_c, Σₙ wₙ Σ_c ρ_c v₍ₙ,c₎ is the gradient of Σₙ wₙ Σ_c ρ_c ⟨f(xₙ), R[c, n]⟩ in the
parameters. The left side weighs *rows*, the right side *outputs*: an example whose rows are wrong, or are another's,
shows. Rows are linear in the gradients of outputs, so that one column Σ_c ρ_c R[c, n] stands for all; and what is
wrong in a matrix shows along a random direction u vᵀ of it, for which a linear map's rows need not be multiplied out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bayes.curvature.batch import Batch, gradients
from lightning_bayes.curvature.plan import GRAPH, Plan
from lightning_bayes.curvature.rows import DenseRows, OuterRows, Rows

__all__ = ["Proof", "proof_of", "wrong_parameters"]

ROUNDING = 3e2
"""Allowed difference along a random direction, in units of the type's rounding, relative to a gradient's norm."""
SMALLEST_SCALE = 0.1
"""That norm counts as at least this much of the largest of all: what cancels is rounded as its terms are."""


@dataclass(frozen=True)
class Proof:
    """One column that stands for all of a batch, and a weight for each example.

    Attributes:
        batch: With the one column Σ_c ρ_c R[c, n].
        weights: wₙ, [N].
        columns: ρ_c, [C].
    """

    batch: Batch
    weights: Tensor
    columns: Tensor


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
    column = torch.tensordot(columns, roots, 1)
    if not bool(column.any()):  # as are all roots then
        return None
    if len(batch.roots) == len(roots):
        grads = [[_combined(columns, grad) for grad in of_call] for of_call in batch.grads]
    else:  # of the columns that follow nothing is known yet
        parts = iter(
            gradients(batch.outputs, [tensor for call in batch.calls for tensor in call.outputs], column)
        )
        grads = [[_one_column(next(parts)) for _ in call.outputs] for call in batch.calls]
    return Proof(
        Batch(batch.calls, batch.outputs, column.unsqueeze(0), grads),
        _random(batch.num_examples, roots, generator),
        columns,
    )


def wrong_parameters(plan: Plan, proof: Proof, layers: Sequence[Rows] = ()) -> list[str]:
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
    column = proof.batch.roots[0]
    seed = proof.weights.reshape(-1, *[1] * (column.dim() - 1)) * column
    truths = dict(
        zip(parameters, gradients(proof.batch.outputs, list(parameters.values()), seed), strict=True)
    )
    directions = _directions(plan, parameters, proof.weights)
    projections = _of_formed(layers, proof, directions)
    rest = {name: pair for name, pair in directions.items() if name not in projections}
    projections |= _projections(plan.layers(proof.batch), proof, rest)
    return _different(projections, truths, directions)


def _directions(
    plan: Plan, parameters: Mapping[str, Tensor], like: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """One pair for each parameter, drawn once for a plan."""
    drawn = plan.directions
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in parameters if name not in drawn]:
        drawn[name] = _direction(parameters[name].shape, like, generator)
    return {name: drawn[name] for name in parameters}


def _of_formed(
    layers: Sequence[Rows], proof: Proof, directions: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The same of `_projections` for rows of all columns that are kept for the structure once they are formed."""
    projections: dict[str, Tensor] = {}
    for rows in layers:
        if isinstance(rows, DenseRows) and rows.name in directions and rows.kept_when_formed:
            try:
                formed = rows.dense()[rows.name]
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:  # as in `_projections`
                continue
            of_examples = proof.columns.to(formed) @ formed.transpose(0, 1)  # as they lie in memory
            projections[rows.name] = _along(proof.weights.to(formed) @ of_examples, *directions[rows.name])
    return projections


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
            except (
                RuntimeError
            ):  # a backward pass that vmap does not know: these rows cannot be formed, and are wrong
                continue
            projections[rows.name] = _along(total, *directions[rows.name])
    return projections


def _along(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left @ total.reshape(len(left), -1) @ right


def _different(
    projections: Mapping[str, Tensor],
    truths: Mapping[str, Tensor | None],
    directions: Mapping[str, tuple[Tensor, Tensor]],
) -> list[str]:
    """Names whose rows are not the truth; what is in neither is zero in both."""
    differences, scales = {}, {}
    for name, truth in truths.items():
        if truth is None and name not in projections:
            continue
        zero = directions[name][0].new_zeros(())
        right = zero if truth is None else _along(truth, *directions[name])
        differences[name] = (projections.get(name, zero) - right).abs()
        scales[name] = zero if truth is None else truth.norm()
    if not differences:
        return []
    difference, scale = torch.stack(list(differences.values())), torch.stack(list(scales.values()))
    allowed = ROUNDING * torch.finfo(scale.dtype).eps * scale.clamp(min=SMALLEST_SCALE * scale.max())
    fine = (difference <= allowed).tolist()  # one wait for the device for all parameters
    return [name for name, is_fine in zip(differences, fine, strict=True) if not is_fine]


def _combined(columns: Tensor, grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    return columns.to(grad).unsqueeze(0).mm(grad.flatten(1)).view(1, *grad.shape[1:])


def _one_column(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.unsqueeze(0)


def _random(size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of either sign between a half and three halves in size."""
    sizes = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    signs = torch.randint(2, (size,), generator=generator) * 2 - 1
    return (sizes * signs).to(like)
